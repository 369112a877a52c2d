"""The runner: results keyed and complete, deadlines held from outside, failures never a reward."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards.load import RewardError
from rewards.workers.process import WarmProcess
from rewards.workers.runner import RewardRunner

SOURCE = '''
import asyncio, os, signal, time

def length(completion, answer=""):
    return float(len(completion))

def mixed(completion):
    if completion == "hang":
        while True: pass
    if completion == "gil":
        return float(len(str(9 ** 9 ** 9)))
    if completion == "sleep":
        time.sleep(1000)
    if completion == "raise":
        raise KeyError("missing isolation layer")
    if completion == "exit":
        os._exit(3)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "memory":
        return float(len(bytearray(8 << 30)))
    if completion == "none":
        return None
    return 1.0

def once(completion, marker):
    """Dies the first time, works the second."""
    if completion == "crash" and not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)
    return 1.0

def pid(completion):
    return float(os.getpid())

def best(completions, answer=""):
    return [float(c == max(completions)) for c in completions]

async def judge(completion):
    if completion == "hang":
        await asyncio.sleep(1000)
    await asyncio.sleep(0.3)
    return 1.0

def heavy(completion):
    import sys
    return float("torch" in sys.modules or "sympy" in sys.modules)

def nap(completion):
    time.sleep(0.05)
    return 1.0

def imports(completion):
    import slow_to_import
    return 1.0

loaded = []
def loads(completion):
    """Loads something in the first call of a process, which is neither an import nor any answer's fault."""
    if not loaded:
        time.sleep(1.5)
        loaded.append(1)
    return mixed(completion)
'''


THREADS = """
import torch
torch.set_num_threads(4)
torch.ones(1 << 20) @ torch.ones(1 << 20)

def dot(completion):
    if completion == "hang":
        while True: pass
    return float(torch.ones(1 << 20).cos().sum() > 0)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SOURCE)
    (path.parent / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\n")
    (path.parent / "threads.py").write_text(THREADS)
    return str(path)


def verdicts(scores):
    return [s.verdict if s else None for s in scores]


def test_every_group_comes_back_once_under_its_key_with_one_score_per_reward_and_sample(file):
    with RewardRunner([f"{file}:length", {"fn": f"{file}:best", "weight": 0.5}], workers=2) as runner:
        for key in range(20):
            runner.submit(("step", key), ["a" * i for i in range(key % 5 + 1)], {"answer": "x"})
        found = {}
        while len(found) < 20:
            for key, scores in runner.completed(30):
                assert key not in found
                found[key] = scores
        assert runner.completed(0) == []
    for (_, key), (lengths, best) in found.items():
        assert [s.value for s in lengths] == [float(i) for i in range(key % 5 + 1)]
        assert [s.value for s in best] == [0.0] * (key % 5) + [1.0]


def test_deadline_crash_and_exception_get_their_verdicts_and_the_others_their_scores(file):
    texts = ["fine", "hang", "fine", "raise", "gil", "none", "sleep", "fine", "exit", "memory", "segfault", "fine"]
    with RewardRunner([{"fn": f"{file}:mixed", "timeout": 0.4}], workers=1, memory_bytes=1 << 30) as runner:
        (scores,) = runner.score(texts, {})
    assert verdicts(scores) == [
        "correct",
        "timeout",
        "correct",
        "error",
        "timeout",
        None,
        "timeout",
        "correct",
        "error",
        "error",
        "error",
        "correct",
    ]
    assert all(math.isnan(s.value) for s in scores if s and s.verdict == "error")
    assert all(s.value == 0 for s in scores if s and s.verdict == "timeout")
    assert "KeyError: 'missing isolation layer'" in scores[3].detail and "mine.py" in scores[3].detail
    assert "MemoryError" in scores[9].detail and "SIGSEGV" in scores[10].detail


def test_a_kill_costs_little_more_than_the_deadline(file):
    with RewardRunner([{"fn": f"{file}:mixed", "timeout": 0.2}], workers=1) as runner:
        start = time.monotonic()
        (scores,) = runner.score(["hang"] * 5 + ["fine"], {})
        wall = time.monotonic() - start
    assert verdicts(scores) == ["timeout"] * 5 + ["correct"]
    assert 1.0 <= wall < 4.0


def test_a_timeout_says_where_the_function_was(file):
    with RewardRunner([{"fn": f"{file}:mixed", "timeout": 0.3}], workers=1) as runner:
        (scores,) = runner.score(["fine", "hang", "sleep"], {})
    assert verdicts(scores) == ["correct", "timeout", "timeout"]
    assert "mine.py" in scores[1].detail and "in mixed" in scores[1].detail and "timeout_s 0.3" in scores[1].detail


def test_an_import_inside_the_function_is_waited_for_in_every_new_worker(file):
    with RewardRunner([{"fn": f"{file}:imports", "timeout": 0.3}], workers=1, recycle_after=2) as runner:
        assert verdicts(runner.score(["x"] * 4, {})[0]) == ["correct"] * 4


def test_a_first_call_that_loads_something_is_given_time(file):
    """Also in the worker after a kill, which has to load it again: it gets what the first one needed."""
    with RewardRunner([{"fn": f"{file}:loads", "timeout": 0.3}], workers=1) as runner:
        assert verdicts(runner.score(["a", "b", "hang", "c"], {})[0]) == ["correct", "correct", "timeout", "correct"]


def test_a_reward_that_never_answers_is_an_error_of_ours(file, monkeypatch):
    monkeypatch.setattr("rewards.workers.runner.FIRST_S", 0.5)
    with RewardRunner([{"fn": f"{file}:mixed", "timeout": 0.1}], workers=1) as runner:
        (scores,) = runner.score(["sleep"] * 3, {})
    assert verdicts(scores) == ["error"] * 3 and "`warm`" in scores[0].detail


def test_threads_that_imports_started_do_not_hang_the_workers(file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    path = Path(file).with_name("threads.py")
    with RewardRunner([{"fn": f"{path}:dot", "timeout": 2}], workers=1) as runner:
        assert verdicts(runner.score(["a", "hang", "b"], {})[0]) == ["correct", "timeout", "correct"]


def test_a_suspended_worker_is_not_the_answers_fault(file):
    with RewardRunner([{"fn": f"{file}:nap", "timeout": 0.4}], workers=1) as runner:
        runner.score(["x"], {})
        runner.submit("k", ["x"] * 8, {})
        pid = runner._slots[0].process.worker_pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        ((_, (scores,)),) = runner.completed(30)
    assert verdicts(scores) == ["correct"] * 8


def test_a_worker_that_stays_suspended_is_replaced(file, monkeypatch):
    monkeypatch.setattr("rewards.workers.runner.STOPPED_S", 0.5)
    with RewardRunner([{"fn": f"{file}:nap", "timeout": 0.3}], workers=1) as runner:
        runner.score(["x"], {})
        runner.submit("k", ["x"] * 8, {})
        time.sleep(0.1)  # it has begun
        os.kill(runner._slots[0].process.worker_pid, signal.SIGSTOP)
        ((_, (scores,)),) = runner.completed(30)
    assert verdicts(scores) == ["correct"] * 8


def test_a_machine_that_stood_still_costs_nobody_a_deadline(file):
    """As when a container is frozen: the runner's own thread does not run either."""
    root = Path(__file__).parents[2]
    code = (
        "import os, sys\nfrom rewards.workers.runner import RewardRunner\n"
        f"r = RewardRunner([{{'fn': {file + ':nap'!r}, 'timeout': 1}}], workers=1)\nr.score(['x'], {{}})\n"
        "r.submit('k', ['x'] * 30, {})\nprint(r._slots[0].process.worker_pid, flush=True)\n"
        "print({s.verdict for s in r.completed()[0][1][0]}, flush=True); r.close()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    pids = [process.pid, int(process.stdout.readline())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0].strip() == "{'correct'}"


def test_a_run_stops_when_most_completions_time_out(file):
    with RewardRunner([{"fn": f"{file}:mixed", "timeout": 0.05}], workers=2) as runner:
        runner.submit("k", ["fine"] * 20 + ["sleep"] * 60, {})
        with pytest.raises(RewardError, match="are time-outs; give the reward a longer timeout_s"):
            while True:
                runner.completed(10)


def test_a_reward_that_always_raises_stops_a_small_run_too(file):
    with RewardRunner([f"{file}:mixed"], workers=1) as runner:
        runner.submit("bad", ["raise"] * 8, {})
        with pytest.raises(RewardError, match="8 of the last 8 scores are errors"):
            runner.completed(10)


def test_a_worker_that_dies_once_is_replaced_and_nothing_is_lost(file, tmp_path):
    spec = {"fn": f"{file}:once", "params": {"marker": str(tmp_path / "marker")}}
    with RewardRunner([spec], workers=1) as runner:
        (scores,) = runner.score(["a", "crash", "b"], {})
    assert verdicts(scores) == ["correct"] * 3


def test_missing_column_is_an_error_with_the_message(file):
    with RewardRunner([{"fn": "rlzero.examples.countdown:countdown_reward"}], workers=1) as runner:
        (scores,) = runner.score(["x"], {"target": 3})
    assert scores[0].verdict == "error" and "['numbers']" in scores[0].detail


def test_many_errors_stop_the_run_with_the_traceback(file):
    with RewardRunner([f"{file}:mixed"], workers=1) as runner:
        runner.submit("bad", ["raise"] * 60, {})
        with pytest.raises(RewardError, match="missing isolation layer"):
            while True:
                runner.completed(10)


def test_a_reward_that_cannot_be_loaded_stops_at_the_start(file):
    with pytest.raises(RewardError, match="Did you mean 'length'"):
        RewardRunner([f"{file}:lenght"], workers=1)


def test_async_rewards_of_a_group_wait_together(file):
    with RewardRunner([{"fn": f"{file}:judge", "timeout": 2}], workers=1) as runner:
        start = time.monotonic()
        (scores,) = runner.score(["a"] * 10 + ["hang"], {})
        wall = time.monotonic() - start
    assert verdicts(scores) == ["correct"] * 10 + ["error"]  # what a server does not answer is no answer's fault
    assert wall < 4  # ten in turn would take 3 s before the hang even begins its 2 s


def test_workers_are_recycled(file):
    with RewardRunner([f"{file}:pid"], workers=1, recycle_after=8) as runner:
        (scores,) = runner.score(["x"] * 32, {})
    assert all(s.verdict == "correct" for s in scores) and len({s.value for s in scores}) == 4


def test_workers_import_neither_torch_nor_sympy(file):
    with RewardRunner([f"{file}:heavy"], workers=1) as runner:
        assert runner.score(["x"], {})[0][0].value == 0


def test_a_group_is_done_before_a_later_one_is_submitted(file):
    with RewardRunner([f"{file}:nap"], workers=2) as runner:
        runner.submit("first", ["x"] * 4, {})
        assert [key for key, _ in runner.completed(10)] == ["first"]
        runner.submit("second", ["x"], {})
        assert [key for key, _ in runner.completed(10)] == ["second"]


def test_submit_blocks_while_too_much_waits(file):
    with RewardRunner([f"{file}:nap"], workers=1, max_waiting=4) as runner:
        start = time.monotonic()
        for key in range(4):
            runner.submit(key, ["x"] * 4, {})
        assert time.monotonic() - start > 0.4  # 16 naps of 0.05 s; at most about 7 may still wait


def test_threads_may_submit_together(file):
    with RewardRunner([f"{file}:length"], workers=2) as runner:
        threads = [threading.Thread(target=runner.submit, args=(k, ["a" * k], {})) for k in range(16)]
        for thread in threads:
            thread.start()
        found = {}
        while len(found) < 16:
            found.update(runner.completed(10))
        for thread in threads:
            thread.join()
    assert {k: v[0][0].value for k, v in found.items()} == {k: float(k) for k in range(16)}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_close_leaves_no_process(file):
    runner = RewardRunner([{"fn": f"{file}:mixed"}], workers=2)
    pids = [pid for slot in runner._slots for pid in (slot.process.worker_pid, slot.process._fork_server.pid)]
    runner.submit("k", ["hang", "sleep"], {})
    time.sleep(0.3)
    runner.close()
    runner.close()
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, pids))


def test_workers_end_when_their_caller_is_killed(file):
    root = Path(__file__).parents[2]
    code = (
        "import os, signal\nfrom rewards.workers.runner import RewardRunner\n"
        f"r = RewardRunner([{file + ':length'!r}], workers=1)\n"
        "print(r._slots[0].process.worker_pid, r._slots[0].process._fork_server.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    pids = [int(p) for p in result.stdout.split()]
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and not any(map(_alive, pids))


def test_a_last_reply_and_the_successors_first_read_together_leave_a_worker_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "worn_out.py").write_text(
        "def make_handler():\n    return lambda request: iter([{'answer': request, 'replace': True}])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    process = WarmProcess("worn_out:make_handler")
    server = process._fork_server.pid
    try:
        (first,) = process.wait(60)
        process.send("last")
        deadline = time.monotonic() + 60
        while process._fork_server.poll() is None and time.monotonic() < deadline:  # until the successor is there
            children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
            if children and children != [str(first["ready"])]:
                break
            time.sleep(0.01)
        time.sleep(0.2)  # it writes its `ready` at once
        replies = process.receive()
        assert [key for reply in replies for key in ("started", "answer", "ready") if key in reply] == [
            "started", "answer", "ready",
        ]  # fmt: skip
        assert process.worker_pid == replies[-1]["ready"] != first["ready"]
    finally:
        process.close()
