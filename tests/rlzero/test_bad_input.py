"""What a user can get wrong, line by line: each through the real command, with what it says and its exit code.

2 is for what was asked (config, data, files, arguments), found before a process is started wherever it can be; 1 for a
run that failed. Nothing here ends in a traceback.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlzero import cli
from trainer.checkpoint import checkpoint

from .conftest import Train

pytestmark = pytest.mark.timeout(170)

GOOD_ROW = {"prompt": "Make 8 from 3, 5.", "numbers": [3, 5], "target": 8, "answer": "3 + 5"}


def rows(*lines: dict | str) -> str:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


# --- found before anything starts -------------------------------------------------------------------------------------
# (what is wrong, files in the working folder, overrides, what the message says)

DATA = "data.train=data.jsonl data.params={} data.evaluation=null evaluation.every=0"
REWARD = "rewards.1.fn=./my.py:reward"

BEFORE = [
    # unknown and mistyped keys
    ("a mistyped key", {}, "stepz=3", ["1 mistake", "stepz: unknown key; did you mean steps?"]),
    ("a key of another section", {}, "temperature=2", ["temperature: unknown key; did you mean rollout.temperature?"]),
    ("a key of a list's entry", {}, "rewards.0.wieght=2", ["rewards.0.wieght", "did you mean rewards.0.weight?"]),
    ("a value of the wrong kind", {}, "steps=many", ["steps: input should be a valid integer", "found 'many'"]),
    ("a mistyped choice", {}, "loss.policy_loss=pppo", ["must be one of ppo, gspo, cispo", "did you mean ppo?"]),
    ("an override without a value", {}, "steps", ["override 'steps': expected the form section.key=value"]),
    (
        "many mistakes, all at once",
        {},
        "stepz=3 optimizer.lr=fast batch.prompts=5 batch.minibatches=4 policy.dtyp=float32",
        ["4 mistakes", "did you mean steps?", "optimizer.lr", "4 equal minibatches", "did you mean policy.dtype?"],
    ),
    # impossible batch arithmetic
    ("minibatches that do not divide", {}, "batch.minibatches=4", ["3 prompts x 3 completions = 9 cannot be split"]),
    ("a group of one", {}, "batch.group_size=1", ["advantage grpo compares the completions of a group"]),
    ("a micro-batch below one sample", {}, "batch.tokens_per_micro_batch=80", ["cannot hold one sample", "= 88"]),
    ("a sample beyond the context", {}, "rollout.max_tokens=100", ["longer than the policy's context of 128 tokens"]),
    ("stale rollouts uncorrected", {}, "staleness=1", ["set loss.correction=tis (or icepop), or staleness=0"]),
    # data
    ("no data file", {}, DATA, ["data.jsonl: no such data file"]),
    ("an empty data set", {"data.jsonl": ""}, DATA, ["data.jsonl: the data set is empty"]),
    (
        "malformed JSON lines",
        {"data.jsonl": rows(GOOD_ROW, '{"prompt": ', GOOD_ROW, "[1]")},
        DATA,
        ["2 bad lines", "data.jsonl:2: malformed JSON at column 12", "data.jsonl:4: expected a JSON object"],
    ),
    (
        "a row without the column",
        {"data.jsonl": rows(GOOD_ROW, {"question": "?"})},
        DATA,
        ["data.jsonl:2: no column 'prompt' (in 1 of 2 rows); found question"],
    ),
    (
        "no such answer column",
        {"data.jsonl": rows(GOOD_ROW)},
        DATA + " data.answer_column=gold",
        ["data.jsonl:1: no column 'gold'", "set data.prompt_column or data.answer_column"],
    ),
    (
        "a prompt longer than its room",
        {"data.jsonl": rows(GOOD_ROW, {**GOOD_ROW, "prompt": "Make 8 from 3, 5. " * 20})},
        DATA,
        ["1 of 2 prompts are longer than the 64 tokens", "data.jsonl:2:"],
    ),
    (
        "a generator that fails",
        {"gen.py": "def rows():\n    raise KeyError('seed')\n"},
        DATA.replace("data.jsonl", "./gen.py:rows"),
        ["./gen.py:rows failed: KeyError: 'seed'"],
    ),
    # rewards
    ("a reward file that is not there", {}, REWARD, ["rewards that cannot be used", "my.py"]),
    (
        "a reward that does not import",
        {"my.py": "import nothing_of_that_name\n"},
        REWARD,
        ["rewards that cannot be used", "my.py:reward", "nothing_of_that_name"],
    ),
    ("a reward with a syntax error", {"my.py": "def reward(:\n"}, REWARD, ["rewards that cannot be used", "my.py"]),
    (
        "a reward of another name",
        {"my.py": "def rewards(completion):\n    return 0.0\n"},
        REWARD,
        ["rewards that cannot be used", "reward"],
    ),
    # the policy's folder
    ("no policy", {}, "policy.path=/nowhere", ["policy.path: /nowhere: no such folder", "hf download"]),
]


@pytest.mark.parametrize(
    ("files", "overrides", "expected"), [case[1:] for case in BEFORE], ids=[case[0] for case in BEFORE]
)
def test_it_is_said_before_anything_starts(command, write_config, tmp_path, files, overrides, expected):
    config = write_config(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, out, err = command("train", config, *overrides.split(" "))
    assert code == 2, out + err
    assert err.startswith("error: ") and "Traceback" not in err
    for part in expected:
        assert part in err, err
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of `rlzero ARGUMENTS`, by its entry point in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlzero", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def edited(folder: Path, target: Path, file: str, change: Callable[[dict], object]) -> Path:
    """A copy of a policy's folder in which `change` edited one JSON file."""
    shutil.copytree(folder, target)
    values = json.loads((target / file).read_text())
    change(values)
    (target / file).write_text(json.dumps(values))
    return target


def test_a_tokenizer_without_eos_is_refused(command, write_config, tiny_policy, tmp_path):
    policy = edited(tiny_policy, tmp_path / "mute", "tokenizer_config.json", lambda c: c.pop("eos_token"))
    code, _, err = command("train", write_config(tmp_path), f"policy.path={policy}")
    assert code == 2 and "the tokenizer has no end-of-sequence token, so a completion could never end" in err


def test_a_tokenizer_of_another_model_is_refused(command, write_config, tiny_policy, tmp_path):
    policy = edited(tiny_policy, tmp_path / "small", "config.json", lambda c: c.update(vocab_size=100))
    code, _, err = command("train", write_config(tmp_path), f"policy.path={policy}")
    assert code == 2 and "vocab_size is 100" in err and "resize_token_embeddings" in err


def test_a_dump_of_something_else_is_refused(command, write_config, tmp_path):
    (tmp_path / "d.jsonl").write_text(rows(GOOD_ROW))
    code, _, err = command("train", write_config(tmp_path), "--from-dump", tmp_path / "d.jsonl")
    assert code == 2 and "not a dump of this release" in err


# --- found by a process of the run ------------------------------------------------------------------------------------


def test_weights_of_another_architecture_end_the_start_with_the_trainers_message(write_config, tiny_policy, tmp_path):
    policy = edited(tiny_policy, tmp_path / "wide", "config.json", lambda c: c.update(hidden_size=128))
    with Train(write_config(tmp_path), f"policy.path={policy}") as train:
        assert train.wait(100) == 2, train.text
        assert " cannot start: " in train.text and "shape" in train.text and "128" in train.text
        assert "Traceback" not in train.text and "died" not in train.text and len(train.text.splitlines()) < 20
        assert not train.left_behind(10.0)


def test_a_checkpoint_of_another_architecture_is_not_resumed_from(
    local_ray, finished, command, write_config, tiny_policy, tmp_path
):
    config = write_config(tmp_path, steps=9)
    shutil.copytree(finished, tmp_path / "runs" / "tiny")
    policy = tmp_path / "deeper"
    shutil.copytree(tiny_policy, policy)
    _make_other_policy(policy)
    code, out, err = command("train", config, f"policy.path={policy}", "--resume")
    assert code == 1, out + err
    assert "step-000008 holds another architecture: num_hidden_layers is 3, here 2" in err
    assert "Traceback" not in out + err and "going on from" not in out + err


def _make_other_policy(folder: Path) -> None:
    import torch

    from trainer.model.v3_config import V3Config
    from trainer.policy import PolicyOptions, load_policy

    shape = {**vars(V3Config.load(folder)), "num_hidden_layers": 2}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    load_policy(PolicyOptions(init=shape, dtype="float32"), torch.device("cpu"), seed=0).save(folder)


def test_a_full_disk_ends_the_run_with_a_message_and_costs_no_checkpoint(write_config, tmp_path):
    """A limit on the size of files, set on the living trainer: the kernel fails its next write in the middle."""
    with Train(write_config(tmp_path, steps=500)) as train:
        train.wait_for_step(1)
        train.actor("TrainerActor").rlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert train.wait(100) == 1, train.text
        assert "was not written: a file is too large" in train.text and "Earlier checkpoints are intact" in train.text
        assert "Traceback" not in train.text and "going on from" not in train.text
        assert not train.left_behind(10.0)
    saved = checkpoint.latest(train.run_dir / "checkpoints")
    checkpoint.verify(saved)
    assert not [path for path in saved.parent.iterdir() if path.name.startswith(".")]


def test_the_table_starts_from_a_config_that_is_right(command, write_config, tmp_path):
    """Else every row above could pass for a reason of its own."""
    path = write_config(tmp_path)
    assert yaml.safe_load(path.read_text())["steps"] == 8
    code, out, err = command("plan", path)
    assert code == 0 and "3 prompts x 3 = 9 completions" in out, err
