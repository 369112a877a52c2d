"""The math reward beside Math-Verify alone: accuracy, checks per second, p50/p99, and what 1 % of bombs does to both.

    python benchmarks/rewards.py [--data FOLDER] [--checks 1000] [--upstream MATH_VERIFY_CHECKOUT] [--json FILE]

Both see the same full responses in the same run, one process each. Math-Verify alone is `verify(parse(gold),
parse(response))` with its default timeouts, as its README shows. The data folder holds gsm8k_test.jsonl, math500.jsonl
and math_train_7474.jsonl (a column `answer`); `--upstream` adds Math-Verify's own test pairs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BOMBS = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorial of 10^7": r"\boxed{(10^7)!}",
    "10^6 digits": "\\boxed{" + "9" * 10**6 + "}",
    "2,000 brackets": "\\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    "50,000 unclosed boxes": "\\boxed{" * 50_000,
}
Case = tuple[str, str]  # response, gold


def load_answers(path: Path) -> list[str]:
    """The golds of a data set, rows without one left out."""
    answers = [json.loads(line)["answer"] for line in path.open()]
    return [str(answer) for answer in answers if answer]


def spell(gold: str) -> str:
    """The same answer as another hand would write it."""
    if re.fullmatch(r"-?\d+", gold) and len(gold.lstrip("-")) > 3:
        return f"{int(gold):,}"
    if re.fullmatch(r"-?\d+", gold):
        return gold + ".0"
    return gold.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right)").replace("+", " + ")


def responses(golds: list[str], count: int, seed: int) -> list[Case]:
    """A third right as it is, a third right in another spelling, a third another question's answer."""
    rng = random.Random(seed)
    cases = []
    for index in range(count):
        gold = golds[index % len(golds)]
        said = [gold, spell(gold), rng.choice(golds)][index % 3]
        cases.append(
            (f"<think>Let me work it out. {'I add and check. ' * 20}</think>\nThe answer is $\\boxed{{{said}}}$.", gold)
        )
    rng.shuffle(cases)
    return cases


def with_bombs(cases: list[Case]) -> list[Case]:
    """The same cases with one in a hundred replaced by a bomb, the kinds in turn."""
    kinds = list(BOMBS.values())
    return [
        (f"</think>{kinds[i // 100 % len(kinds)]}", gold) if i % 100 == 50 else (text, gold)
        for i, (text, gold) in enumerate(cases)
    ]


def _check(which: str) -> Any:
    if which == "ours":
        from rewards import math_reward

        math_reward(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")  # imports what a comparison needs
        return lambda text, gold: math_reward(text, gold).value == 1.0
    import math_verify

    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]

    def check(text: str, gold: str) -> bool:
        return bool(math_verify.verify(math_verify.parse(f"${gold}$", config), math_verify.parse(text, config)))

    check("$1$", "1")
    return check


def child(which: str) -> None:
    """Checks the cases on stdin and writes one line each: seconds and answer."""
    cases = json.loads(sys.stdin.read())
    check = _check(which)
    print("ready", flush=True)
    for text, gold in cases:
        start = time.perf_counter()
        answer = check(text, gold)
        print(time.perf_counter() - start, int(answer), flush=True)


def measure(which: str, cases: list[Case], limit_s: float) -> dict[str, Any]:
    """Checks per second, percentiles in ms and the answers; `finished` tells whether all were done within `limit_s`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", which],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(json.dumps(cases), timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
    rows = [line.split() for line in output.splitlines()[1:] if line.count(" ") == 1]
    seconds = sorted(float(row[0]) for row in rows)
    finished = len(rows) == len(cases)
    wall = sum(seconds) if finished else limit_s
    return {
        "checks": len(rows),
        "finished": finished,
        "per_second": len(rows) / wall if wall else 0.0,
        "p50_ms": 1e3 * seconds[len(seconds) // 2] if seconds else None,
        "p99_ms": 1e3 * seconds[int(0.99 * len(seconds))] if seconds else None,
        "max_ms": 1e3 * seconds[-1] if seconds else None,
        "answers": [int(row[1]) for row in rows],
    }


def generated(data: Path) -> dict[str, dict[str, Any]]:
    """How we read the spellings, near misses and phrases that benchmarks/reward_cases.py makes of the golds."""
    import reward_cases

    from rewards import math_reward

    golds = sorted(
        {gold.strip() for name in ("math500", "math_train_7474") for gold in load_answers(data / f"{name}.jsonl")}
    )
    golds += reward_cases.MORE_GOLDS
    numbers = [
        answer.rpartition("####")[2].strip().replace(",", "") for answer in load_answers(data / "gsm8k_train.jsonl")
    ]
    stated, unstated = reward_cases.sentences([n for n in numbers if n.isdigit() and n != "0"], seed=2)
    boxed = "<think>x</think>\\boxed{%s}"
    tagged = "<think>x</think>\n<answer>%s</answer>"
    worded = [gold for gold in golds if reward_cases.has_parts(gold)]
    sets = {
        "other spellings of golds": (boxed, [c for gold in golds for c in reward_cases.spellings(gold)], True),
        "near misses of golds with words, units, parts": (
            boxed,
            [c for gold in worded for c in reward_cases.near_misses(gold)],
            False,
        ),
        "phrases that state the value, no box": (tagged, stated, True),
        "phrases that do not": (tagged, unstated, False),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, (form, cases, right) in sets.items():
        start = time.perf_counter()
        wrong = [c for c in cases if bool(math_reward(form % c[2], c[1]).value) != right]
        found[name] = {"cases": len(cases), "wrong": len(wrong), "examples": wrong[:20]}
        found[name]["per_second"] = len(cases) / (time.perf_counter() - start)
    return found


def speed(data: Path, checks: int, limit_s: float) -> dict[str, Any]:
    """Rates and percentiles on GSM8K-like answers and a MATH mix, without and with 1 % of bombs."""
    found: dict[str, Any] = {}
    for name, file in (
        ("gsm8k", "gsm8k_test.jsonl"),
        ("math", "math_train_7474.jsonl"),
        ("latex", "math_train_7474.jsonl"),
    ):
        golds = load_answers(data / file)
        if name == "latex":  # as in Big-Math: symbolic answers, no plain numbers
            golds = [gold for gold in golds if re.search(r"[a-zA-Z^=]", gold)]
        random.Random(1).shuffle(golds)
        clean = responses(golds, checks, seed=2)
        for kind, cases in (("clean", clean), ("1 % bombs", with_bombs(clean))):
            for which in ("ours", "math-verify"):
                result = measure(which, cases, limit_s)
                result.pop("answers")
                found[f"{name}, {kind}, {which}"] = result
    return found


def accuracy(data: Path, shuffled: int, limit_s: float) -> dict[str, Any]:
    """Golds against themselves, golds against other golds, deceitful and honest responses."""
    spec = importlib.util.spec_from_file_location("math_cases", ROOT / "tests" / "rewards" / "math_cases.py")
    assert spec is not None and spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    sets: dict[str, tuple[list[Case], int]] = {}
    for name, file in (
        ("GSM8K", "gsm8k_test.jsonl"),
        ("MATH-500", "math500.jsonl"),
        ("MATH-train", "math_train_7474.jsonl"),
    ):
        golds = load_answers(data / file)
        others = golds[:]
        random.Random(3).shuffle(others)
        sets[f"{name} gold = itself"] = [(f"\\boxed{{{gold}}}", gold) for gold in golds[:shuffled]], 1
        pairs = [(f"\\boxed{{{o}}}", g) for g, o in zip(golds, others, strict=True) if plainly(g) != plainly(o)]
        sets[f"{name} shuffled"] = pairs[:shuffled], 0
    sets["deceitful responses"] = [case for family in cases.DECEITS.values() for case in family], 0
    sets["honest responses"] = list(cases.HONEST), 1
    found = {}
    for name, (pairs, expected) in sets.items():
        for which in ("ours", "math-verify"):
            result = measure(which, pairs, limit_s)
            wrong = [pair for pair, answer in zip(pairs, result["answers"], strict=False) if answer != expected]
            found[f"{name}, {which}"] = {
                "cases": len(pairs),
                "checked": result["checks"],
                "wrong": len(wrong),
                "examples": wrong[:5] if which == "ours" else [],
            }
    return found


def plainly(gold: str) -> str:
    """Golds that only differ in spelling (`k = 3` and `3`, `2 \\text{ euros}` and `2`) are not told apart when
    shuffled.
    """
    text = re.sub(r"\\(?:text|mbox)\{[^{}]*\}|\^\{?\\circ\}?|\\[!$,]|[\s$]|\\%|^[a-z]=", "", gold.replace(" ", ""))
    return re.sub(r"\\d?frac(\d)(\d)", r"\\frac{\1}{\2}", text)


def upstream(checkout: Path) -> dict[str, Any]:
    """Math-Verify's own test pairs through `rewards.math.equal`; options of a pair (precision, strict) are ignored."""
    from rewards.math import equal

    sys.path.insert(0, str(checkout))
    right, missed = 0, []
    for name in ("test_all", "test_boxed", "test_numina_cases", "test_open_thoughts", "test_strict", "test_yujianll"):
        module = importlib.import_module(f"tests.{name}")
        for function in vars(module).values():
            if getattr(function, "__module__", "") != f"tests.{name}":
                continue
            for mark in getattr(function, "pytestmark", []):
                columns = [column.strip() for column in mark.args[0].split(",")] if mark.name == "parametrize" else []
                if "gold" not in columns:
                    continue
                for values in mark.args[1]:
                    row = dict(zip(columns, values, strict=True))
                    expected = bool(row.get("expected", row.get("result")))
                    if equal(row["gold"], row["pred"]) == expected:
                        right += 1
                    else:
                        missed.append([row["gold"][-60:], row["pred"][-60:], expected])
    return {
        "pairs": right + len(missed),
        "agree": right,
        "share": right / max(1, right + len(missed)),
        "missed": missed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--checks", type=int, default=1000, help="responses per measurement of speed")
    parser.add_argument("--shuffled", type=int, default=2000, help="pairs per measurement of accuracy")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a measurement may take")
    parser.add_argument("--only", choices=("accuracy", "speed"))
    parser.add_argument("--upstream", type=Path, help="a checkout of Math-Verify")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("ours", "math-verify"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if not options.data.is_dir():
        raise SystemExit(f"no folder {options.data}; give the data sets with --data")
    report: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    if options.upstream:
        report["upstream"] = upstream(options.upstream)
        print(
            f"Math-Verify's own pairs: {report['upstream']['agree']} of {report['upstream']['pairs']}"
            f" ({report['upstream']['share']:.1%})"
        )
    if options.only != "speed":
        report["generated"] = generated(options.data)
        for name, row in report["generated"].items():
            print(f"{name:<48} wrong {row['wrong']:>4} of {row['cases']:>6} ({row['wrong'] / row['cases']:.2%})")
        report["accuracy"] = accuracy(options.data, options.shuffled, options.limit)
        for name, row in report["accuracy"].items():
            undone = (
                ""
                if row["checked"] == row["cases"]
                else f" ({row['cases'] - row['checked']} not done in {options.limit:.0f} s)"
            )
            print(f"{name:<44} wrong {row['wrong']:>5} of {row['checked']:>5}{undone}")
    if options.only != "accuracy":
        report["speed"] = speed(options.data, options.checks, options.limit)
        for name, row in report["speed"].items():
            undone = "" if row["finished"] else f"  only {row['checks']} of {options.checks} in {options.limit:.0f} s"
            times = "  ".join(
                f"{k} {row[k + '_ms']:.2f} ms" for k in ("p50", "p99", "max") if row[k + "_ms"] is not None
            )
            print(f"{name:<36} {row['per_second']:>8.0f} checks/s  {times}{undone}")
        for kind in ("gsm8k", "math"):
            clean, bombed = (report["speed"][f"{kind}, {name}, ours"]["per_second"] for name in ("clean", "1 % bombs"))
            print(f"{kind}: 1 % bombs change our rate by {bombed / clean - 1:+.1%}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
