"""Fuzzes extraction and comparison of mathematical answers for a set time and says what it found.

    python benchmarks/fuzz_rewards.py [--minutes 10] [--seed 0] [--json FILE]

Texts are made of pieces of real templates, of mutated honest and deceitful responses, and of random characters. Looked
for: an exception, a call that takes long, an answer that the text does not hold, a reward for a gold that no text can
state, text behind the end of sequence or in the reasoning that changes the answer, a spelling that is not stable.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rewards.format import format_reward
from rewards.math import decide, math_reward
from rewards.math.boxes import find_answer
from rewards.math.normal import Unreadable, normalise
from rlzero.examples.countdown.reward import countdown_reward

ROOT = Path(__file__).resolve().parents[1]
IMPOSSIBLE = "\\frac{7919}{7907}"  # two primes that no piece contains
SLOW_S = 0.25


def load(name: str):  # noqa: ANN201
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "rewards" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Maker:
    """Random texts from three sources."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pieces = load("test_extract").PIECES
        cases = load("math_cases")
        self.responses = [text for family in cases.DECEITS.values() for text, _ in family] + [
            text for text, _ in cases.HONEST
        ]

    def text(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            return "".join(rng.choices(self.pieces, k=rng.randint(0, 40)))
        if kind < 0.9:
            text = rng.choice(self.responses)
            for _ in range(rng.randint(1, 6)):
                at = rng.randint(0, len(text))
                change = rng.random()
                if change < 0.4:
                    text = text[:at] + rng.choice(self.pieces) + text[at:]
                elif change < 0.7:
                    text = text[:at] + text[at + rng.randint(1, 5) :]
                elif change < 0.85:
                    other = rng.choice(self.responses)
                    text = text[:at] + other[rng.randint(0, len(other)) :]
                else:
                    text = text[:at] + text[at : at + 8] * rng.randint(2, 200) + text[at:]
            return text
        return "".join(
            chr(rng.choice([rng.randint(1, 126), rng.randint(128, 0xD7FF), rng.randint(0xE000, 0x1FFFF)]))
            for _ in range(rng.randint(0, 60))
        )


def examine(text: str) -> list[str]:
    """What is wrong with how the checkers treat this text."""
    wrong = []
    start = time.process_time()
    found = find_answer(text)
    if found.text is not None:
        if any(word not in text for word in found.text.split()):
            wrong.append("an answer that is not in the text")
        try:
            once = normalise(found.text)
            if normalise(once) != once:
                wrong.append("normalising twice is not normalising once")



        except Unreadable:
            pass
    if time.process_time() - start > SLOW_S:
        wrong.append("slow extraction")
    if find_answer("a</think>\\boxed{17}</s>" + text).text != "17":
        wrong.append("text behind the end changes the answer")
    inside = text.replace("</think>", "").replace("<|im_end|>", "").replace("</s>", "")
    if find_answer(f"<think>{inside}</think>nothing").text is not None:
        wrong.append("the reasoning answers")
    start = time.process_time()
    if math_reward(text, IMPOSSIBLE).value:
        wrong.append("a reward for an impossible gold")
    decide("42", text)
    format_reward(text)
    countdown_reward(text, [1, 2, 3], 7919)
    if time.process_time() - start > SLOW_S:
        wrong.append("a slow check")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    maker, counts, examples = Maker(options.seed), Counter[str](), dict[str, str]()
    end, texts = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < end:
        text = maker.text()
        texts += 1
        try:
            problems = examine(text)
        except Exception:
            problems = [traceback.format_exc().strip().splitlines()[-1][:200]]
            examples.setdefault(problems[0], traceback.format_exc())
        for problem in problems:
            counts[problem] += 1
            examples[problem] = min((examples.get(problem, text), text), key=len)
    print(f"{texts} texts in {options.minutes:g} minutes; findings: {dict(counts) or 'none'}")
    for problem, text in examples.items():
        print(f"- {problem}: {text[:400]!r}")
    if options.json:
        options.json.write_text(
            json.dumps({"texts": texts, "minutes": options.minutes, "findings": counts, "examples": examples}, indent=1)
        )


if __name__ == "__main__":
    main()
