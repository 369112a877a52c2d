"""Speed, overhead, data sets, attacks and left-over processes of the code sandbox, beside a cold interpreter.

    python benchmarks/sandbox.py                     speed and attacks
    python benchmarks/sandbox.py --data ../shared/data   also every HumanEval and MBPP reference
    python benchmarks/sandbox.py --orphans 10000     also that many jobs, a third of which try to leave a process behind
    python benchmarks/sandbox.py --fuzz-s 600        also random bytes at whatever reads a job's claims
    python benchmarks/sandbox.py --json              one JSON object instead of text

Everything runs on one core at a time (a job and its parent take turns), so jobs/s is per core. CPU times include the
parent, the fork server and its jobs; they are what remains comparable on a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards.code import AssertTests, CallTests, ProgramTests, Tests, _judge_answer, check, extract_code, parse_tests
from rewards.sandbox import Limits, Sandbox, SandboxError, exchange, values
from tests.rewards.attacks.run import ATTACKS, beats_naive, run_attacks

LIMITS = Limits()
CALL = CallTests("f", [((1,), {}), ((2,), {}), ((3,), {})], [2, 3, 4])
PROGRAM = ProgramTests(["3 4\n"], ["7\n"])
ASSERT = AssertTests(["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"])
FUNCTION = "def f(x):\n    return x + 1\n"
READER = "a, b = map(int, input().split())\nprint(a + b)\n"


def cpu_s(sandbox: Sandbox) -> float:
    """CPU seconds used so far by this process, the fork server and all jobs that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total, todo = own.ru_utime + own.ru_stime, [sandbox._process.pid]
    while todo:
        pid = todo.pop()
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own and its ended children's
        todo += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return total


def speed(sandbox: Sandbox, code: str, tests: Tests, seconds: float) -> dict[str, float]:
    """Jobs a second by the clock and by CPU time, and the time of one job (milliseconds)."""
    for _ in range(5):
        check(sandbox, code, tests, limits=LIMITS)
    took, started, used = [], time.perf_counter(), cpu_s(sandbox)
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        outcomes = check(sandbox, code, tests, limits=LIMITS)
        took.append(time.perf_counter() - before)
        if any(outcome.verdict != "correct" for outcome in outcomes):
            raise SystemExit(f"a right answer was judged {outcomes}")
    wall, used = time.perf_counter() - started, cpu_s(sandbox) - used
    cuts = statistics.quantiles(took, n=100)
    return {
        "jobs_per_s": len(took) / wall, "jobs_per_cpu_s": len(took) / used, "cpu_ms": used / len(took) * 1e3,
        "p10_ms": cuts[9] * 1e3, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3,
    }  # fmt: skip


def cold(seconds: float) -> dict[str, float]:
    """The same program by a fresh interpreter without isolation (what most reward functions do)."""
    took, started = [], time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", READER], input=b"3 4\n", capture_output=True, check=True)
        took.append(time.perf_counter() - before)
    return {"jobs_per_s": len(took) / sum(took), "p50_ms": statistics.median(took) * 1e3}


def data_sets(sandbox: Sandbox, folder: Path) -> dict[str, dict]:
    """Every reference solution against its own tests, and the time it takes."""
    results = {}
    for name, read in {
        "humaneval.jsonl": _human_eval,
        "mbpp.jsonl": _mbpp,
        "mbpp_sanitized_427.jsonl": _sanitized,
    }.items():
        if not (folder / name).exists():
            print(f"{name} is not in {folder}: left out", file=sys.stderr)
            continue
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        failed, started = [], time.perf_counter()
        for row in rows:
            code, tests = read(row)
            outcomes = check(sandbox, code, tests, limits=Limits(timeout_s=20, total_s=60))
            if any(outcome.verdict != "correct" for outcome in outcomes):
                failed.append(f"{row['task_id']}: {outcomes[-1].why}")
        results[name] = {
            "passed": len(rows) - len(failed), "rows": len(rows), "failed": failed,
            "rows_per_s": len(rows) / (time.perf_counter() - started),
        }  # fmt: skip
    return results


def _human_eval(row: dict) -> tuple[str, Tests]:
    return row["prompt"] + row["canonical_solution"], parse_tests(row["test"], row["entry_point"], row["prompt"])


def _mbpp(row: dict) -> tuple[str, Tests]:
    return row["code"], parse_tests(row["test_list"] + row["challenge_test_list"], prepare=row["test_setup_code"])


def _sanitized(row: dict) -> tuple[str, Tests]:
    return row["code"], parse_tests(row["test_list"], prepare="\n".join(row["test_imports"]))


def orphans(sandbox: Sandbox, jobs: int) -> dict[str, int]:
    """Processes below this one before and after `jobs` jobs, a third of which try to leave something behind."""
    programs = [
        FUNCTION, "import os\ndef f(x): os._exit(0)",
        "import ctypes, threading, time\ndef f(x):\n    threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    libc = ctypes.CDLL(None)\n    for n in (57, 58):\n        if libc.syscall(n) == 0:\n"
        "            libc.setsid()\n"
        "            time.sleep(99)\n    return x + 1",
    ]  # fmt: skip
    before = len(_family())
    for number in range(jobs):
        sandbox.call(programs[number % 3], "f", [((1,), {})], limits=LIMITS)
    return {"jobs": jobs, "processes_before": before, "processes_after": len(_family())}


def _family() -> list[int]:
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        found += children
        todo += children
    return found


_SAMPLES = [1, -(2**70), 2.5, "x", None, True, [1, 2], [[1], "a"], (1, (2,)), {1: "a"}, {1, 2}, b"ab", 3j, range(3)]
_WORDS = [
    "```",
    "```python\n",
    "\n",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "x = 1",
    "~~~",
    "User:",
    "</s>",
    "`",
]
_TAGS = sorted(values._READ_SEQUENCE | values._READ_FLAT | values._READ_MAPPING) + (
    "i f b ba c r td ty fr dc dt da ti o".split()
)
_TEXTS = [
    "nan",
    "inf",
    "-inf",
    "1/3",
    "1/0",
    "1e9",
    "0x1f",
    "-0xff",
    "int",
    "sNaN",
    "2024-01-01",
    "12:00",
    "ff",
    "",
    "\ud800",
]


def fuzz(seconds: float, seed: int = 0) -> dict[str, int]:
    """Broken frames, mutated and invented values, and random completions, at the functions that read them.

    Any exception but the one each of them documents ends the program with its traceback, and so does a wrong "correct".
    """
    chance = random.Random(seed)
    counts = {"streams": 0, "values_read": 0, "values_refused": 0, "judged_correct": 0, "completions": 0}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stream = values.frame({"ready": True}) + b"".join(_message(chance) for _ in range(chance.randrange(4)))
        counts["streams"] += 1
        for frame in _read(stream):
            expected = chance.choice(_SAMPLES)
            outcome = _judge_answer(frame, expected, chance.choice([None, 1e-6]), False)
            counts["values_refused" if outcome.why.startswith("unreadable") else "values_read"] += 1
            if outcome.verdict == "correct":
                counts["judged_correct"] += 1
                if repr(values.decode(frame["value"])) != repr(expected):
                    raise SystemExit(f"{frame} was taken for {expected!r}")
        text = "".join(chance.choice(_WORDS) for _ in range(chance.randrange(12)))
        found = extract_code(text)
        if found is not None and found.rstrip("\n") not in text:
            raise SystemExit(f"extract_code made {found!r} of {text!r}")
        counts["completions"] += 1
    return counts


def _message(chance: random.Random) -> bytes:
    """One frame: a true value, an invented one, or either with bytes changed and (often) a length that fits again."""
    value = values.encode(chance.choice(_SAMPLES)) if chance.random() < 0.4 else _invented(chance, 4)
    piece = bytearray(values.frame({chance.choice(["value", "value", "raised", "load", "missing"]): value}))
    for _ in range(chance.choice([0, 0, 0, 1, 2, 8])):
        position = chance.randrange(len(piece))
        piece[position : position + chance.randrange(3)] = chance.choice(
            [b'"', b"[", b"]", b"{", b",", b"1", b"-", b"e", b"\\u", b"\x00", b"\xff", bytes([chance.randrange(256)])]
        )
    if chance.random() < 0.8 and len(piece) >= 4:
        piece[:4] = (len(piece) - 4).to_bytes(4, "big")
    return bytes(piece)


def _invented(chance: random.Random, depth: int) -> object:
    kind = chance.random()
    if kind < 0.5 and depth:
        return [chance.choice(_TAGS), *[_invented(chance, depth - 1) for _ in range(chance.randrange(4))]]
    if kind < 0.6 and depth:
        return [_invented(chance, depth - 1) for _ in range(chance.randrange(3))]
    return chance.choice([*_TEXTS, *_TAGS, 0, 1, -1, 2**64, 1e300, 0.5, True, None, {}])


def _read(stream: bytes) -> list[dict]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        job = exchange.Job(1, ours, None, memoryview(b""), max_bytes=10_000, max_frames=8)
        theirs.sendall(stream)
        job.receive()
        return job.frames


def measure(options: argparse.Namespace) -> dict:
    """All the figures asked for."""
    started = time.perf_counter()
    with Sandbox() as sandbox:
        result: dict = {"python": sys.version.split()[0], "start_s": time.perf_counter() - started}
        for name, code, tests in (
            ("function call", FUNCTION, CALL),
            ("stdin", READER, PROGRAM),
            ("assert", FUNCTION, ASSERT),
        ):
            result.setdefault("speed", {})[name] = speed(sandbox, code, tests, options.seconds)
        result["speed"]["cold interpreter, no isolation"] = cold(options.seconds)
        if options.data:
            result["data_sets"] = data_sets(sandbox, options.data)
        if options.orphans:
            result["orphans"] = orphans(sandbox, options.orphans)
        if options.attacks:
            rows = run_attacks(sandbox, ATTACKS)
            naive = {attack.name for attack in ATTACKS if attack.naive and beats_naive(attack)}
            result["attacks"] = [{**vars(row), "beats_naive": row.name in naive} for row in rows]
    if options.fuzz_s:
        result["fuzz"] = fuzz(options.fuzz_s)
    return result


def show(result: dict) -> None:
    """The figures as text, each beside its limit."""
    print(f"Python {result['python']}, sandbox started in {result['start_s']:.2f} s, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'':28}{'jobs/s':>9}{'/CPU s':>9}{'CPU ms':>9}{'p10 ms':>9}{'p50 ms':>9}{'p99 ms':>9}   target")
    targets = {"function call": ">= 150 jobs/s", "stdin": ">= 150 jobs/s", "assert": ">= 80 jobs/s (two processes)"}
    for name, row in result["speed"].items():
        keys = ("jobs_per_s", "jobs_per_cpu_s", "cpu_ms", "p10_ms", "p50_ms", "p99_ms")
        cells = "".join(f"{row[key]:9.1f}" if key in row else f"{'':9}" for key in keys)
        print(f"{name:28}{cells}   {targets.get(name, '')}")
    for name, row in result.get("data_sets", {}).items():
        print(
            f"\n{name}: {row['passed']} of {row['rows']} references pass, {row['rows_per_s']:.0f} rows/s",
            *row["failed"],
            sep="\n  ",
        )
    if "orphans" in result:
        row = result["orphans"]
        print(f"\n{row['jobs']} jobs: {row['processes_before']} processes before, {row['processes_after']} after")
    if "attacks" in result:
        print("\nattacks (naive = paid by a checker that runs everything in one process)")
        for row in result["attacks"]:
            state = f"SUCCEEDED: {row['succeeded']}" if row["succeeded"] else "blocked"
            naive = "naive" if row["beats_naive"] else ""
            print(
                f"  {row['name'][:46]:46} {row['kind']:8} {naive:6} {row['verdict']:8} {row['seconds']:5.2f} s  {state}"
            )
        won = sum(bool(row["succeeded"]) for row in result["attacks"])
        names = len({row["name"] for row in result["attacks"]})
        print(f"  {names} programs, {len(result['attacks'])} runs, {won} succeeded")
    if "fuzz" in result:
        print(f"\nfuzz: {result['fuzz']}")


def main() -> None:
    """Measures and prints; exit code 1 for an attack that succeeded, a failed reference or a process left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each speed")
    parser.add_argument("--data", type=Path, help="folder of humaneval.jsonl and mbpp.jsonl")
    parser.add_argument("--orphans", type=int, default=0)
    parser.add_argument("--fuzz-s", type=float, default=0.0)
    parser.add_argument("--no-attacks", dest="attacks", action="store_false")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        result = measure(options)
    except SandboxError as error:
        raise SystemExit(f"no figures: {error}") from error
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    left = result.get("orphans", {"processes_before": 0, "processes_after": 0})
    raise SystemExit(
        any(row["succeeded"] for row in result.get("attacks", []))
        or any(row["failed"] for row in result.get("data_sets", {}).values())
        or left["processes_after"] > left["processes_before"]
    )


if __name__ == "__main__":
    main()
