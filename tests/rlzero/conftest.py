"""What the tests of whole runs share: a tiny policy, the config of a run on it, and one uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from rlzero.examples.countdown import text as base_text
from rlzero.report.log import read_lines
from trainer.model.v3_config import V3Config
from trainer.policy import PolicyOptions, load_policy

ROOT = Path(__file__).parents[2]
STEPS = 8

# Countdown alone would give a policy of random weights nothing but zeros, and then no update would change a weight.
REWARDS = '''
import zlib


def letters(completion: str) -> float:
    """The share of letters, so that almost every group teaches something."""
    return sum(c.isalpha() for c in completion) / max(1, len(completion))


def coin(completion: str) -> float:
    """0 or 1, neither rare: groups of two are all equal about every other time."""
    return float(zlib.crc32(completion.encode()) % 2)


def picky(completion: str) -> float:
    """Fails on about every third completion."""
    if zlib.crc32(completion.encode()) % 3 == 0:
        raise ArithmeticError("this completion is beyond me")
    return letters(completion)


def broken(completion: str) -> float:
    raise ArithmeticError("every completion is beyond me")
'''


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """A V3 model of about 0.3 M parameters with the demo's tokenizer; its logits are far from uniform."""
    folder = tmp_path_factory.mktemp("tiny-policy")
    tokenizer = base_text.tokenizer()
    config = V3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
        first_k_dense_replace=1, num_attention_heads=2, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        n_group=4, topk_group=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        num_nextn_predict_layers=1, max_position_embeddings=128, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    policy = load_policy(PolicyOptions(init=vars(config), dtype="float32"), torch.device("cpu"), seed=0)
    policy.save(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_config(tiny_policy, tmp_path_factory) -> Callable[..., Path]:
    """Writes a run's YAML and returns its path: `write_config(folder, **{"rollout.workers": 2})`."""
    rewards = tmp_path_factory.mktemp("rewards") / "made_for_tests.py"
    rewards.write_text(REWARDS)

    def write(folder: Path, reward: str = "letters", **changes: Any) -> Path:
        tree = {
            "name": "tiny", "output_dir": str(folder / "runs"), "steps": STEPS, "device": "cpu", "threads": 1,
            "policy": {"path": str(tiny_policy), "dtype": "float32"},
            "data": {"train": "countdown", "evaluation": "countdown", "params": {"count": 64}, "max_prompt_tokens": 64},
            "rewards": [
                {"fn": "rlzero.examples.countdown:countdown_reward"}, {"fn": f"{rewards}:{reward}", "weight": 0.5}
            ],
            "reward_workers": 1,
            "batch": {"prompts": 3, "group_size": 3, "minibatches": 1, "tokens_per_micro_batch": 256},
            "rollout": {"engine": "torch", "max_tokens": 24, "max_gap": 1e-4},
            "loss": {"kl_coef": 0.01}, "algorithm": {"reference_refresh_steps": 3},
            "optimizer": {"lr": 1e-3, "weight_decay": 0, "warmup_steps": 2},
            "checkpoint": {"every": 1, "keep": 100}, "evaluation": {"samples": 2, "prompts": 4, "every": 4},
            "tracking": [],
        }  # fmt: skip
        for name, value in changes.items():
            section = tree
            *parents, key = name.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[key] = value
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


class Train:
    """`rlzero train` as a process group of its own, as a terminal would start it. Leaves nothing running behind."""

    command = ("rlzero.cli", "train")

    def __init__(self, config: Path, *arguments: str):
        self.run_dir = config.parent / "runs" / "tiny"
        self.output = (config.parent / "output.txt").open("a+")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))  # where packages lie there
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", *self.command, str(config), *arguments],
            env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=config.parent, start_new_session=True, stdout=self.output, stderr=subprocess.STDOUT,
            preexec_fn=_hears_hangups,
        )  # fmt: skip
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Train:
        return self

    def __exit__(self, *_: object) -> None:
        self.family()
        self.kill()
        for process in self.left_behind(0.0):
            process.kill()
        self.output.close()

    @property
    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def family(self) -> list[psutil.Process]:
        """The run's processes that are alive now; remembers them."""
        try:
            parent = psutil.Process(self.process.pid)
            for process in [parent, *parent.children(recursive=True)]:
                self._seen[process.pid] = process
        except psutil.NoSuchProcess:
            pass  # it has ended
        return self.left_behind(0.0)

    def actor(self, name: str) -> psutil.Process:
        """The process of the Ray actor whose class is `name`."""
        return next(p for p in self.family() if _title(p).startswith(f"ray::{name}"))

    def left_behind(self, within_s: float) -> list[psutil.Process]:
        """Processes of the run, seen earlier, that are still there after `within_s`."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=within_s)
        return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """SIGKILL for the whole process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)

    def wait(self, timeout_s: float = 200.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end in {timeout_s} s; it said:\n{self.text}") from None

    def wait_for_step(self, step: int, timeout_s: float = 200.0) -> None:
        """Waits until the metrics of `step` are written; fails if the run ends before."""
        until_s = time.monotonic() + timeout_s
        while not any(line["step"] >= step for line in read_lines(self.run_dir / "metrics.jsonl")):
            assert self.process.poll() is None, f"the run ended before step {step}; it said:\n{self.text}"
            assert time.monotonic() < until_s, f"no step {step} in {timeout_s} s; the run said:\n{self.text}"
            time.sleep(0.02)


def _hears_hangups() -> None:
    """As in a terminal: where the tests run under nohup, their children would ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="session")
def finished(write_config, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of STEPS steps, every checkpoint kept."""
    with Train(write_config(tmp_path_factory.mktemp("finished"))) as train:
        assert train.wait() == 0, train.text
        return train.run_dir
