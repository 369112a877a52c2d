"""Jobs: what honest programs may do, how deadlines and byte counts end the others, and that nothing is left behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.code import AssertTests, CallTests, ProgramTests, check
from rewards.sandbox import Limits, Sandbox, SandboxError, exchange, values
from rewards.workers.runner import RewardRunner

ROOT = Path(__file__).parents[2]
SHORT = Limits(timeout_s=1.0, total_s=4.0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as one:
        yield one


def answers(run):
    return [values.decode(frame["value"]) if "value" in frame else frame["raised"]["type"] for frame in run.frames]


def inputs(*arguments):
    return [((one,), {}) for one in arguments]


def outcomes(sandbox, code, tests, limits=SHORT, **options):
    return [outcome.verdict for outcome in check(sandbox, code, tests, limits=limits, **options)]


def descendants(root: int) -> list[int]:
    """Process ids below `root`, in this machine's numbering."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        try:
            children = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            children = []
        found += children
        todo += children
    return found


# -- calls -----------------------------------------------------------------------------------------------------------


def test_answers_come_in_order_with_their_types(sandbox):
    run = sandbox.call("def f(x): return (x, [x], {x: None})", "f", inputs(1, "a", 2.5))
    assert answers(run) == [(x, [x], {x: None}) for x in (1, "a", 2.5)] and run.end == "finished"


def test_an_exception_fails_its_own_call_only(sandbox):
    assert answers(sandbox.call("def f(x): return 1 // x", "f", inputs(1, 0, 2))) == [1, "ZeroDivisionError", 0]


def test_keywords_methods_and_solution_classes(sandbox):
    assert answers(sandbox.call("def f(a, *, b): return a - b", "f", [((5,), {"b": 2})])) == [3]
    code = "class Solution:\n    def twice(self, x): return 2 * x"
    assert answers(sandbox.call(code, "twice", inputs(4))) == answers(sandbox.call(code, "Solution.twice", inputs(4)))


def test_a_missing_function_and_bad_code_are_told(sandbox):
    assert "defines no 'f'" in sandbox.call("g = 1", "f", inputs(1)).load
    assert sandbox.call("def f(:", "f", inputs(1)).load.startswith("SyntaxError")
    assert sandbox.call("import numpy_that_is_not_there", "f", inputs(1)).load.startswith("ModuleNotFoundError")


def test_the_process_is_new_for_every_job(sandbox):
    code = "import builtins\ndef f(x):\n    seen = hasattr(builtins, 'mark'); builtins.mark = 1; return seen"
    assert answers(sandbox.call(code, "f", inputs(1, 1))) == [False, True]
    assert answers(sandbox.call(code, "f", inputs(1))) == [False]


def test_a_timeout_costs_one_test_and_the_others_still_run(sandbox):
    code = "def f(x):\n    while x == 2: pass\n    return x"
    tests = CallTests("f", inputs(1, 2, 3), [1, 2, 3])
    assert outcomes(sandbox, code, tests, credit="share") == ["correct", "timeout", "correct"]
    assert outcomes(sandbox, code, tests) == ["correct", "timeout"]


def test_a_dead_process_costs_one_test_and_the_others_still_run(sandbox):
    code = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x"
    tests = CallTests("f", inputs(1, 2, 3), [1, 2, 3])
    assert outcomes(sandbox, code, tests, credit="share") == ["correct", "wrong", "correct"]


def test_the_time_of_all_tests_is_bounded(sandbox):
    started = time.monotonic()
    tests = CallTests("f", inputs(*range(20)), list(range(20)))
    limits = Limits(timeout_s=0.5, total_s=1.2)
    got = outcomes(sandbox, "import time\ndef f(x): time.sleep(60)", tests, limits, credit="share")
    assert got == ["timeout"] * 20 and time.monotonic() - started < 8


def test_more_memory_than_allowed_is_an_error_of_the_candidate(sandbox):
    code = "def f(mb): return len(bytearray(mb << 20)) >> 20"
    assert answers(sandbox.call(code, "f", inputs(300, 600, 100))) == [300, "MemoryError", 100]


# -- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "print(sum(map(int, input().split())))",
        "import sys; print(sum(map(int, sys.stdin.read().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "import os; print(sum(map(int, os.read(0, 99).split())))",
        "import sys; print(sum(int(x) for line in sys.stdin.buffer for x in line.split()))",
        "import fileinput\nfor l in fileinput.input(): print(sum(map(int, l.split())))",
        "import sys\nsys.stdout.write(str(eval(input().replace(' ', '+'))))\nsys.exit()",
        "def main():\n    print(5)\nif __name__ == '__main__': main()",
        "print(5); exit(0)",
        "import os; os.write(1, b'5'); os._exit(0)",
        "import atexit\natexit.register(print, 5)",
        "import threading\nthreading.Thread(target=print, args=(5,)).start()",
        "import asyncio\nasync def main(): print(5)\nasyncio.run(main())",
        "class A: x = 5\nprint([A.x for _ in range(1)][0])",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def f(n): return n and 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50000) - 49995)); t.start(); t.join()",
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and 1 + f(n - 1)\nprint(f(50000) - 49995)",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as p: print(*p.map(abs, [-5]))",
        "import sys\nprint('debug', file=sys.stderr)\nsys.stderr.flush()\nprint(5, flush=True)",
        "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: print(5))\n"
        "signal.setitimer(signal.ITIMER_REAL, .01)\n"
        "time.sleep(.05)",
        "import typing, dataclasses, heapq, bisect, decimal, fractions, statistics, re, json, string\n"
        "import random, copy, cmath\n"
        "import collections.abc, functools, itertools, operator, array, datetime, calendar, hashlib\n"
        "import uuid, zlib, ctypes\n"
        "@dataclasses.dataclass\nclass P: x: int = 5\nprint(P().x)",
        "import typing\nclass P(typing.NamedTuple):\n    x: int\nprint(P(5).x)",
        "import pickle\nprint(pickle.loads(pickle.dumps(5)))",
        "print(5, end='')",
        "import logging\nlogging.warning('x')\nprint(5)",
    ],
)
def test_ordinary_programs_work(sandbox, code):
    assert outcomes(sandbox, code, ProgramTests(["2 3\n"], ["5"])) == ["correct"], sandbox.program(code, b"2 3\n")


@pytest.mark.parametrize(
    "code",
    ["print(5)\nraise SystemExit(1)", "print(5)\n1 / 0", "print(5)\nexit('error')", "import os\nprint(5)\nos._exit(1)"],
)
def test_a_failed_exit_is_wrong_even_with_the_right_output(sandbox, code):
    assert outcomes(sandbox, code, ProgramTests([""], ["5"])) == ["wrong"]


def test_large_input_and_output(sandbox):
    text = " ".join(map(str, range(300_000)))
    assert outcomes(sandbox, "print(*input().split()[::-1])", ProgramTests([text], [" ".join(text.split()[::-1])])) == [
        "correct"
    ]


def test_output_is_capped(sandbox):
    run = sandbox.program("while True: print('x' * 1000)", limits=Limits(output_bytes=100_000))
    assert run.end == "output" and len(run.output) < 400_000


# -- assertions ------------------------------------------------------------------------------------------------------


def test_each_assertion_is_judged(sandbox):
    tests = AssertTests(["assert f(1) == 2", "assert f(2) == 4", "assert f(3) == 4"])
    assert outcomes(sandbox, "def f(x): return x + 1", tests, credit="share") == ["correct", "wrong", "correct"]


def test_objects_of_the_candidate_can_be_used_but_not_compared(sandbox):
    code = (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x); return self\n"
        "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n"
        "    def __contains__(self, x): return x in self.items\n    def __eq__(self, other): return True\n"
        "def numbers():\n    yield 1; yield 2"
    )
    good = [
        "s = Stack()\ns.push(1).push('b')\nassert len(s) == 2 and s[1] == 'b' and s.items == [1, 'b']\n"
        "assert 1 in s and 3 not in s",
        "s = Stack()\ns.items = [5]\nassert list(s.items) == [5] and s[0] == 5",
        "assert list(numbers()) == [1, 2]",
        "s = Stack()\nassert s == s and s is not None and not s == None",
        "assert not Stack() and Stack().push(1)",
    ]
    bad = [
        "assert Stack() == 5",
        "assert Stack() == Stack()",
        "assert not Stack() != 5",
        "assert Stack()",
        "assert numbers() == [1, 2]",
    ]
    entries = ("Stack", "numbers")
    assert outcomes(sandbox, code, AssertTests(good, entries), credit="share") == ["correct"] * len(good)
    assert outcomes(sandbox, code, AssertTests(bad, entries), credit="share") == ["wrong"] * len(bad)


def test_an_object_is_not_true_here_and_false_there(sandbox):
    code = "class C:\n    n = 0\n    def __bool__(self): C.n += 1; return C.n % 2 == 1\ndef f(): return C()"
    assert outcomes(sandbox, code, AssertTests(["x = f()\nassert x and not x"])) == ["wrong"]
    assert outcomes(
        sandbox, "import re\ndef f(s): return re.match('a', s)", AssertTests(["assert f('ab') and not f('b')"])
    ) == ["correct"]


def test_helpers_of_the_task_are_the_tasks_own(sandbox):
    """A candidate that redefines what the test computes with does not change it."""
    tests = AssertTests(
        ["assert abs(poly([2, -1], f([2, -1]))) < 1e-9"], ("f",), setup="def poly(c, x): return c[0] + c[1] * x"
    )
    assert outcomes(sandbox, "def f(c): return -c[0] / c[1]", tests) == ["correct"]
    assert outcomes(sandbox, "def poly(c, x): return 0\nabs = lambda x: 0\ndef f(c): return 1", tests) == ["wrong"]


def test_a_candidate_may_be_called_like_a_builtin(sandbox):
    assert outcomes(sandbox, "def sum(a, b): return a + b", AssertTests(["assert sum(1, 2) == 3"])) == ["correct"]


def test_an_expected_exception_can_be_expected(sandbox):
    test = "try:\n    f(-1)\nexcept ValueError as e:\n    assert 'negative' in str(e)\nelse:\n    assert False"
    assert outcomes(sandbox, "def f(x): raise ValueError('negative')", AssertTests([test])) == ["correct"]
    assert outcomes(sandbox, "def f(x): raise KeyError('negative')", AssertTests([test])) == ["wrong"]


def test_a_loop_of_the_test_cannot_be_ended_early(sandbox):
    test = "for got, want in zip(map(f, [1, 2]), [1, 2]):\n    assert got == want\n"
    for error in ("StopIteration", "GeneratorExit", "StopAsyncIteration"):
        assert outcomes(sandbox, f"def f(x): raise {error}", AssertTests([test])) == ["wrong"]


@pytest.mark.parametrize(
    "test, why",
    [
        ("assert 1 == 1", "without calling"),
        ("f(", "SyntaxError"),
        ("assert f(lambda: 1) == 1", "cannot be sent"),
        ("assert undefined.x == f(1)", "without calling"),
    ],
)
def test_a_test_that_cannot_work_is_our_error(sandbox, test, why):
    with pytest.raises(ValueError, match=why):
        check(sandbox, "def f(x): return 1", AssertTests([test], ("f",)), limits=SHORT)


def test_memory_used_up_by_answers_fails_the_test(sandbox):
    test = "x = []\nfor i in f(1):\n    x.append([i] * 100)\nassert len(x) == 3"
    code = "def f(x): return range(10**12)"
    assert outcomes(sandbox, code, AssertTests([test]), Limits(timeout_s=20, memory_bytes=64 << 20)) == ["wrong"]


# -- processes -------------------------------------------------------------------------------------------------------


def test_no_process_is_left_behind():
    programs = [
        "def f(x): return x",
        "import os\ndef f(x): os._exit(3)",
        "import os\ndef f(x): os.abort()",
        "import threading, time\ndef f(x): threading.Thread(target=time.sleep, args=(99,)).start(); return x",
        "import os\ndef f(x):\n    try: os.fork()\n    except OSError: return x",
        "import ctypes\ndef f(x):\n    if ctypes.CDLL(None).fork() == 0:\n        while True: pass\n    return x",
    ]
    before = set(descendants(os.getpid()))
    with Sandbox() as one:
        alone = descendants(os.getpid())
        for number in range(150):
            one.call(programs[number % len(programs)], "f", inputs(1), limits=SHORT)
        one.call("while True: pass", "f", inputs(1), limits=Limits(timeout_s=0.2))
        assert sorted(descendants(os.getpid())) == sorted(alone)
    until = time.monotonic() + 10
    while any(map(_alive, set(alone) - before)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(_alive, set(alone) - before))


def test_everything_ends_with_its_owner():
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom rewards.sandbox import Sandbox\n"
        "s = Sandbox(); print('ready', flush=True)\ns.call('while True: pass', 'f', [((), {})])"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    owner.stdout.readline()
    until = time.monotonic() + 10
    while len(family := descendants(owner.pid)) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(family) >= 3  # the fork server's two processes and a job
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    while any(_alive(pid) for pid in family) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in family)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_dead_fork_server_is_an_error_of_ours():
    with Sandbox() as one:
        one._process.kill()
        hung_up = select.poll()  # the forking process dies a moment after its parent, and could still do a job
        hung_up.register(one._control.line, select.POLLHUP)
        assert hung_up.poll(10_000)
        with pytest.raises(SandboxError, match="fork server"):
            one.call("def f(x): return x", "f", inputs(1))
        assert one.closed
        with pytest.raises(SandboxError, match="closed"):
            one.program("")


def test_a_job_killed_from_outside_is_an_error_of_ours(sandbox):
    """As the kernel does when the machine is out of memory."""
    with Sandbox() as one:
        before = set(descendants(os.getpid()))

        def kill():
            while not (new := set(descendants(os.getpid())) - before):
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(new.pop(), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(SandboxError, match="out of memory"):
            one.call("import time\ndef f(x): time.sleep(5)", "f", inputs(1))
        killer.join()


def test_the_time_that_a_job_waits_for_a_core_does_not_count(tmp_path):
    """Neither here nor in the worker of a run; a loop without end is late all the same."""
    core, before = min(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    began = time.process_time()
    sum(range(10**7))
    work = f"def f(x): return sum(range({int(0.6e7 / (time.process_time() - began))}))"  # 0.6 s of a core
    spin = [sys.executable, "-c", "while True: pass"]
    hogs = []
    os.sched_setaffinity(0, {core})  # what starts from here on inherits it
    try:
        spec = {"fn": "rewards.code:code_reward", "timeout": 1.2, "params": {"timeout_s": 1.0, "total_s": 1.1}}
        with Sandbox() as one, RewardRunner([spec], workers=1) as runner:
            tests = {"tests": {"fn_name": "f", "inputs": [[1]], "outputs": [0]}}
            assert runner.score(["```python\ndef f(x): return 0\n```"], tests)[0][0].verdict == "correct"
            # in sessions of their own: cores are shared out by session
            hogs += [subprocess.Popen(spin, start_new_session=True) for _ in range(2)]
            limits = Limits(timeout_s=1.0)
            assert one.call(work, "f", inputs(1), limits=limits).end == "finished"
            assert one.call("def f(x):\n    while True: pass", "f", inputs(1), limits=limits).end == "timeout"
            texts = [f"```python\n{code}\n```" for code in (f"{work} * 0", "def f(x):\n    while True: pass")]
            assert [score.verdict for score in runner.score(texts, tests)[0]] == ["correct", "timeout"]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        os.sched_setaffinity(0, before)


def test_a_sandbox_is_not_used_across_a_fork(sandbox):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.program("")
        except SandboxError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert b"before a fork" in os.read(reader, 1000)
    os.close(reader), os.close(writer)
    assert sandbox.program("print(1)").output == b"1\n"


def test_threads_share_a_sandbox_one_at_a_time(sandbox):
    got = []
    work = [
        threading.Thread(target=lambda n=n: got.append(answers(sandbox.call("def f(x): return x * x", "f", inputs(n)))))
        for n in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted(got) == [[n * n] for n in range(8)]


# -- the protocol, fuzzed --------------------------------------------------------------------------------------------

_frames = st.lists(
    st.binary(max_size=40)
    | st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=3)
        | st.sampled_from(["l", "L", "d", "s", "i", "dc"]),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(["value", "raised", "load", "test", "passed", "ready", "missing"]), x, max_size=2
            )
        ),
        max_leaves=6,
    ).map(values.frame),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_frames)
def test_whatever_is_said_after_ready_is_only_a_claim(said):
    """No bytes make reading fail with anything but an end, and no claim is taken for another process's word."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        job = exchange.Job(1, ours, None, memoryview(b""), max_bytes=1000, max_frames=3)
        theirs.sendall(values.frame({"ready": True}) + b"".join(said))
        end = job.receive()
        assert end in (None, "output", "died") and job.ready and not job.ended
        assert len(job.frames) <= 3 and all(type(frame) is dict for frame in job.frames)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(_frames, st.sampled_from([3, 4]))
def test_a_process_that_says_anything_at_all_is_wrong(sandbox, said, fd):
    code = (
        f"import os\ndef f(x):\n    try: os.write({fd}, {b''.join(said)!r})\n    except OSError: pass\n    os._exit(x)"
    )
    assert outcomes(sandbox, code, CallTests("f", inputs(0), [object()])) == ["wrong"]
    assert outcomes(sandbox, code, AssertTests(["assert f(0) == 'never said' * 9"])) == ["wrong"]
