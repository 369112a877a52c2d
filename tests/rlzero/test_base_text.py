"""The base's text: nothing of the reinforcement-learning task is in it, and its recipe repeats bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from rlzero.examples.countdown import pretrain as stages
from rlzero.examples.countdown import text as base_text
from rlzero.examples.countdown.task import rows, split_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "demo-base.yaml"
QUESTION = re.compile(r"Make (\d+) from (\d+(?:, \d+)*)\.")
EXPRESSION = re.compile(r"[0-9()+\-*/]+")  # a longest run of the signs that expressions are written with
NUMBER = re.compile(r"\d+")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    config = stages.BaseConfig.load(RECIPE)
    rng = random.Random("documents to look through")
    return [base_text.document(rng, config.patience, config.patient_share, config.shares) for _ in range(4000)]


def test_every_question_in_the_text_is_over_numbers_of_base(documents):
    questions = [match for text in documents for match in QUESTION.finditer(text)]
    sizes = [len(match[2].split(", ")) for match in questions]
    assert sizes.count(3) > 1000 and sizes.count(4) > 500
    for match in questions:
        numbers = tuple(map(int, match[2].split(", ")))
        assert len(numbers) < 3 or split_of(numbers) == "base", match[0]


def test_every_expression_over_three_or_four_numbers_is_over_numbers_of_base(documents):
    counted = {3: 0, 4: 0}
    for text in documents:
        for run in EXPRESSION.findall(text):
            numbers = tuple(map(int, NUMBER.findall(run)))
            if len(numbers) >= 3:
                assert len(numbers) <= 4, run
                counted[len(numbers)] += 1
                assert split_of(numbers) == "base", run
    assert counted[3] > 1000 and counted[4] > 500


def test_no_prompt_of_the_task_is_in_the_text(documents):
    prompts = {
        row["prompt"] for split in ("train", "held_out") for row in rows(split, 0, 4000 if split == "train" else 300)
    }
    found = {match[0] for text in documents for match in QUESTION.finditer(text)}
    assert len(found) > 1500 and not found & prompts


def test_numbers_left_on_the_way_are_never_an_instance_of_the_task(documents):
    left = [tuple(map(int, run.split(","))) for text in documents for run in re.findall(r":(\d+(?:,\d+){2,})", text)]
    assert len(left) > 500
    assert all(split_of(numbers) == "base" for numbers in left)


def test_arithmetic_in_the_text_is_right(documents):
    checked = 0
    for text in documents:
        for left, op, right, result in re.findall(r"(?<![\d)=*/+\-x])(\d+)([+*/-])(\d+)=(\d+)(?![\d+*/-])", text):
            a, b = Fraction(left), Fraction(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op] == int(result)
            checked += 1
    assert checked > 5_000


def test_the_tokenizer_gives_every_text_back_and_one_token_to_each_number_up_to_199(documents):
    tokenizer = base_text.tokenizer()
    for text in [*documents[:300], "naïve – 名前 \n\t 12345"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for number in range(200):
        assert len(tokenizer(str(number))["input_ids"]) == 1


PRETRAIN = """
import sys
from pathlib import Path
import torch
from rlzero.examples.countdown import pretrain as stages

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = stages.BaseConfig.load(sys.argv[1], [
        "device=cpu", "dtype=float32", "save_dtype=float32", "tokens_per_step=2048", "tokens_per_micro_batch=2560",
        f"output_dir={sys.argv[2]}",
    ])
    stages.pretrain(config, say=lambda line: None, steps=3)
"""


@pytest.mark.long
def test_the_recipes_first_steps_repeat_bit_for_bit_in_a_new_process(tmp_path):
    script = tmp_path / "pretrain.py"
    script.write_text(PRETRAIN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    folders = [tmp_path / name / "demo-base" for name in ("first", "second")]
    processes = [
        subprocess.Popen([sys.executable, str(script), str(RECIPE), str(folder.parent)], env=environment)
        for folder in folders
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    lines = [[json.loads(line) for line in (folder / "training.jsonl").open()] for folder in folders]
    losses = [[line["loss"] for line in part] for part in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert losses[0][2] < losses[0][0]  # it learns
