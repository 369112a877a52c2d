"""The command line: instant help, exit codes 0, 1, 2 and 130, errors as messages."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rewards.score import Score
from rlzero import cli
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.data import dump
from rlzero.examples.countdown import text as base_text
from rlzero.plan.of_run import make_plan, read_size
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout
from trainer.model.v3_config import V3Config
from trainer.policy import PolicyOptions, load_policy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny V3 model with the demo's tokenizer, in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = base_text.tokenizer()
    config = V3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64,
        v_head_dim=16, max_position_embeddings=512, num_nextn_predict_layers=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    loaded = load_policy(PolicyOptions(init=vars(config), dtype="float32"), torch.device("cpu"), seed=0)
    loaded.save(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(tmp_path, policy):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "tiny", "output_dir": str(tmp_path / "runs"), "steps": 2, "device": "cpu",
                "policy": {"path": str(policy), "dtype": "float32"},
                "data": {"train": "countdown", "evaluation": "countdown", "params": {"count": 16},
                         "max_prompt_tokens": 64},
                "rewards": [
                    {"fn": "rlzero.examples.countdown:countdown_reward"}, {"fn": "rewards.format:format_reward"}
                ],
                "batch": {"prompts": 2, "group_size": 2, "minibatches": 1, "tokens_per_micro_batch": 256},
                "rollout": {"max_tokens": 8}, "evaluation": {"prompts": 2, "samples": 2},
                "tracking": [],
            }
        )
    )  # fmt: skip
    return path


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `rlzero ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["rlzero", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        cli.main()
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command_and_imports_nothing_heavy():
    began_s = time.process_time()
    code = (
        "import sys; sys.argv = ['rlzero', '--help']\nfrom rlzero.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert time.process_time() - began_s < 1
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    for command in ("train", "generate", "eval", "score", "plan", "report", "export", "pretrain"):
        assert re.search(rf"\b{command}\b", done.stdout), command


def test_the_project_can_be_run_as_a_command():
    entry = re.search(r'rlzero = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text())
    assert (entry[1], entry[2]) == (cli.__name__, cli.main.__name__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing argument"),
        (["trian"], "No such command"),
        (["train", "none.yaml"], "none.yaml: 1 mistake"),
        (["report", "/nowhere"], "no run has written here"),
        (["export", "/nowhere", "/tmp/x"], "neither a model (no config.json) nor a run with a checkpoint"),
    ],
)
def test_wrong_use_is_a_message_and_exit_code_2(monkeypatch, capsys, arguments, message):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_all_mistakes_of_a_config_are_printed_at_once(monkeypatch, capsys, config_file):
    code, _, err = run(monkeypatch, capsys, "train", config_file, "stepz=3", "batch.minibatches=3", "--dry-run")
    assert code == 2
    assert "did you mean steps?" in err and "3 equal minibatches" in err and "2 mistakes" in err


def test_the_version_is_told(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--version")
    assert code == 0 and re.fullmatch(r"rlzero \d+\.\d+\.\d+\n", out)


def test_a_failure_of_the_program_is_a_message_and_exit_code_1(monkeypatch, capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "report.html").mkdir()
    code, _, err = run(monkeypatch, capsys, "report", tmp_path)
    assert code == 1 and err.startswith("error: IsADirectoryError") and "RLZERO_TRACEBACK=1" in err


def test_the_readmes_config_is_a_valid_one(tmp_path):
    (text,) = [t for t in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "primes" in t]
    (tmp_path / "primes.yaml").write_text(text)
    assert Config.load(tmp_path / "primes.yaml").rewards[0].fn == "./my_reward.py:names_one"


@pytest.mark.parametrize("name", ["r1-zero", "dapo", "dr-grpo"])
def test_every_shipped_config_loads(name):
    assert Config.load(ROOT / "configs" / f"{name}.yaml").name == name


def test_export_of_a_model_converts_its_weights_and_keeps_the_rest(monkeypatch, capsys, policy, tmp_path):
    code, _, err = run(monkeypatch, capsys, "export", policy, tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0, err
    before, after = load_file(policy / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        assert after[name].dtype == wanted.dtype and torch.equal(after[name], wanted), name
    assert not (tmp_path / "out" / "trainer_state").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_export_never_overwrites(monkeypatch, capsys, policy, tmp_path):
    code, _, err = run(monkeypatch, capsys, "export", policy, tmp_path)
    assert code == 2 and "exists; give a new folder" in err


def test_the_plan_counts_the_models_parameters_exactly(policy, config_file):
    module = load_policy(PolicyOptions(path=str(policy), dtype="float32"), torch.device("cpu"), seed=0).module
    body = sum(tensor.numel() for name, tensor in module.named_parameters() if "mtp_layers" not in name)
    size = read_size(policy)
    assert size.parameters == body
    plan = make_plan(Config.load(config_file))
    held = plan.trainer.parts
    assert held["weights (FP32)"] == 4 * (body + size.mtp) and held["optimizer moments (FP32)"] == 8 * body
    assert plan.engine.parts["cache of all completions at full length, at most"] == 4 * 72 * (512 + 64) * 2 * 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere.jsonl", "nowhere.jsonl: no such data file"),
        ("data.prompt_column=text", "no column 'text'"),
        ("data.max_prompt_tokens=3", "prompts are longer than the 3 tokens"),
        ("rewards.0.fn=rlzero.examples.countdown:none", "rewards that cannot be used"),
        ("rewards.0.fn=./nowhere.py:reward", "rewards that cannot be used"),
        ("policy.path=/nowhere", "/nowhere: no such folder"),
        ("rollout.max_tokens=1000", "longer than the policy's context of 512 tokens"),
    ],
)
def test_a_run_that_cannot_start_says_why_before_anything_starts(monkeypatch, capsys, config_file, override, message):
    code, _, err = run(monkeypatch, capsys, "train", config_file, override, "batch.tokens_per_micro_batch=2000")
    assert code == 2 and message in err, err


def test_a_folder_with_a_run_in_it_is_not_trained_into_by_accident(monkeypatch, capsys, config_file, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text('{"step": 0}\n')
    code, _, err = run(monkeypatch, capsys, "train", config_file)
    assert code == 2 and "holds a run already; go on with --resume" in err


def test_eval_prints_the_figures_and_its_dump_trains_one_step(monkeypatch, capsys, config_file, tmp_path):
    dumped = tmp_path / "groups.jsonl"
    more = ("rollout.engine=torch", "evaluation.prompts=8", "--output", dumped)
    code, out, err = run(monkeypatch, capsys, "eval", config_file, *more)
    assert code == 0, err
    assert "countdown_reward, which expects one expression over the given numbers inside <answer>" in err
    assert re.search(r"^pass_at_1 +0\b", out, re.M) and re.search(r"^n +2$", out, re.M)
    groups = dump.load(dumped)
    assert [len(group.rollouts) for group in groups] == [2] * 8
    code, out, err = run(monkeypatch, capsys, "train", config_file, "--from-dump", dumped)
    assert code == 0, err
    assert re.search(r"^grad_norm ", out, re.M), out


def test_a_dump_reads_back_as_what_was_written(tmp_path):
    routed = np.arange(12, dtype=np.int16).reshape(3, 2, 2)
    rollout = Rollout("a/1", 0, (1, 2), [3], [-0.1234567890123], [(4, 1)], "stop", "<think>\u2028", routed)
    group = Group(Prompt("1", "q", (1, 2), {"answer": "é"}), [rollout], [[Score(0.5, "correct", {"m": 1.0}), None]])
    dump.save(tmp_path / "d.jsonl", [group], step=3)
    (again,) = dump.load(tmp_path / "d.jsonl")
    assert np.array_equal(again.rollouts[0].routed_experts, routed)
    again.rollouts[0].routed_experts = rollout.routed_experts
    assert again == group


@pytest.mark.parametrize(
    ("text", "message"), [("", "not a dump of this release"), ('{"kind": "rlzero dump 1"}\n{}\n', "d.jsonl:2")]
)
def test_a_file_that_is_no_dump_is_an_error(tmp_path, text, message):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        dump.load(tmp_path / "d.jsonl")


def test_score_tells_verdicts_and_false_positives(monkeypatch, capsys, tmp_path):
    rows = [("3+5", True), ("5+3", False), ("5-3", False)]
    (tmp_path / "c.jsonl").write_text(
        "".join(
            json.dumps(
                {"completion": f"<think>x</think><answer>{a}</answer>", "numbers": [3, 5], "target": 8, "label": r}
            )
            + "\n"
            for a, r in rows
        )
    )
    arguments = ("score", tmp_path / "c.jsonl", "--reward", "rlzero.examples.countdown:countdown_reward")
    code, out, err = run(monkeypatch, capsys, *arguments, "--workers", 1)
    assert code == 0, err
    assert "correct 2, wrong 1" in out and "label wrong: 1 rewarded (false positives), 1 not" in out
    code, out, err = run(monkeypatch, capsys, *arguments, "--explain", 3)
    assert code == 0 and "wrong" in out
    code, out, err = run(monkeypatch, capsys, *arguments, "--completion", "text")
    assert code == 2 and "line 1: no column 'text'" in err


def test_a_run_larger_than_the_machine_is_refused(monkeypatch, capsys, config_file):
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    code, _, err = run(monkeypatch, capsys, "plan", config_file)
    assert code == 2 and "for weights, gradients and optimizer, and this machine has 977 KiB of memory" in err
