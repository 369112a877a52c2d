"""`rlzero sft`: the loss it minimises, the order of its rows, what it leaves behind, a resumed run is the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlzero import cli
from rlzero.config.sft import SftConfig
from rlzero.examples.countdown import text as base_text
from rlzero.report.log import read_lines
from rlzero.stages import sft
from trainer.policy import PolicyOptions, load_policy

ROOT = Path(__file__).parents[2]
V3 = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 96, "initializer_range": 0.1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.1,
}  # fmt: skip
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny policies with the demo's tokenizer and a chat template, by name."""
    tokenizer = base_text.tokenizer()
    tokenizer.chat_template = CHAT
    made = {}
    for name, init in {"v3": V3, "llama": LLAMA, "qwen3": QWEN3}.items():
        made[name] = tmp_path_factory.mktemp(name)
        fields = {**init, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        load_policy(PolicyOptions(init=fields, dtype="float32"), torch.device("cpu"), seed=0).save(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def rows(count, offset=0):
    return [
        {"messages": [
            {"role": "user", "content": f"What is {n} from {n * n % 90}?"},
            {"role": "assistant", "content": " " + " ".join(str(i) for i in range(n % 7 + 1)) + "."},
        ]}
        for n in range(offset, offset + count)
    ]  # fmt: skip


@pytest.fixture
def config_file(tmp_path, folders):
    """Writes a run's YAML: `config_file("llama", **{"optimizer.lr": 1e-4})`."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(5, 40)))

    def write(model="v3", **changes):
        tree = {
            "name": "tiny", "output_dir": str(tmp_path / "runs"), "device": "cpu", "threads": 1,
            "policy": {"path": str(folders[model]), "dtype": "float32"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "evaluation": str(tmp_path / "held-out.jsonl")},
            "epochs": 2, "rows_per_step": 6, "tokens_per_micro_batch": 96, "evaluation": {"every": 3},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.0},
            "checkpoint": {"every": 2, "keep": 100}, "tracking": [],
        }  # fmt: skip
        for name, value in changes.items():
            section = tree
            *parents, key = name.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[key] = value
        path = tmp_path / "sft.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `rlzero sft ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["rlzero", "sft", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def without_times(lines):
    return [{k: v for k, v in line.items() if "_s" not in k or k == "tokens"} for line in lines]


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v3", "llama", "qwen3"])
def test_losses_are_those_of_transformers_on_the_same_tokens(config_file, folders, name):
    """First step and held-out rows: cross-entropy per learned token of transformers' own model, one row at a time."""
    config = SftConfig.load(config_file(name, epochs=1, max_steps=1, **{"optimizer.warmup_steps": 0}))
    sft.train(config, resume=False)
    prepared = sft.prepare(config)
    stock = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()

    def loss(examples):
        total = count = 0.0
        for row in examples:
            tokens = torch.tensor(row.tokens, dtype=torch.long)
            with torch.no_grad():
                logprobs = stock(tokens[None]).logits[0, :-1].double().log_softmax(-1)
            chosen = logprobs.gather(1, tokens[1:, None])[:, 0][torch.tensor(row.learned[1:])]
            total, count = total - chosen.sum().item(), count + len(chosen)
        return total / count, count

    first, learned = loss([prepared.train[i] for i in prepared.plan.rows(0)])
    (line,) = read_lines(config.run_dir / "metrics.jsonl")
    assert line["loss"] == pytest.approx(first, abs=1e-4) and line["tokens"] == learned
    before = read_lines(config.run_dir / "evals.jsonl")[0]
    held_out, learned = loss(prepared.held_out)
    assert before["step"] == 0 and before["tokens"] == learned
    assert before["loss"] == pytest.approx(held_out, abs=1e-4)


@pytest.mark.parametrize(("name", "extra"), [
    ("v3", {"mtp_weight": 0.3, "balance": "sequence", "balance_weight": 1e-3}), ("llama", {}),
])  # fmt: skip
def test_a_run_learns_and_leaves_a_folder_that_transformers_loads(config_file, folders, name, extra):
    config = SftConfig.load(config_file(name, epochs=8, save_dtype="bfloat16", tracking=["tensorboard"], **extra))
    folder = sft.train(config, resume=False)
    evaluations = read_lines(config.run_dir / "evals.jsonl")
    assert evaluations[-1]["loss"] < 0.5 * evaluations[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    checkpointed = load_file(config.run_dir / "checkpoints" / "step-000027" / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == checkpointed.keys()
    assert torch.equal(stored["model.norm.weight"], checkpointed["model.norm.weight"].bfloat16())
    assert not (folder / "trainer_state").exists()
    assert list((config.run_dir / "tensorboard").glob("events*"))
    (last,) = read_lines(config.run_dir / "metrics.jsonl")[-1:]
    assert last["epoch"] == 8 and last["lr"] == pytest.approx(1e-3)  # a tenth, at the very end
    assert {"mtp_loss", "balance_loss", "router_max_violation/1"} <= last.keys() or name == "llama"


def test_a_new_model_is_pre_trained_on_text(config_file, folders, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "User: 1 2 3 4 5 6 7 8 9"}\n' * 4)
    init = {**V3, "vocab_size": 512}
    config = SftConfig.load(
        config_file(data={"train": str(tmp_path / "text.jsonl")}, epochs=30, rows_per_step=4, evaluation={},
                    policy={"init": init, "tokenizer": str(folders["v3"]), "dtype": "float32"})
    )  # fmt: skip
    sft.train(config, resume=False)
    lines = read_lines(config.run_dir / "metrics.jsonl")
    assert lines[0]["loss"] > 5 and lines[-1]["loss"] < 0.5


# --- order and steps -------------------------------------------------------------------------------------------------


def plan(lengths, **fields):
    given = {"policy": {"path": "x"}, "data": {"train": "x"}, "rows_per_step": 4, **fields}
    return sft.make_plan(lengths, SftConfig(**given))


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    made = plan([5] * 10, epochs=3)
    epochs = [made.order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert made.order == plan([5] * 10, epochs=3).order != plan([5] * 10, epochs=3, seed=1).order
    assert [len(made.rows(step)) for step in range(made.steps)] == [4] * 7 + [2]
    assert Counter(i for step in range(made.steps) for i in made.rows(step)) == Counter(list(range(10)) * 3)


def test_a_step_takes_the_rows_that_its_tokens_allow():
    lengths = [30, 10, 50, 20, 200, 10, 10]
    made = plan(lengths, epochs=2, rows_per_step=None, tokens_per_step=60)
    steps = [[lengths[i] for i in made.rows(step)] for step in range(made.steps)]
    assert all(sum(step) <= 60 or step == [200] for step in steps)  # a row is never split
    assert sum(len(step) for step in steps) == 14
    # no step could have taken the next row too
    assert all(sum(a) + b[0] > 60 for a, b in zip(steps, steps[1:], strict=False))


def test_max_steps_ends_the_run_and_its_schedule(config_file):
    config = SftConfig.load(config_file(max_steps=4, epochs=5))
    sft.train(config, resume=False)
    lines = read_lines(config.run_dir / "metrics.jsonl")
    assert len(lines) == 4 and lines[-1]["lr"] == pytest.approx(1e-3)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v3", "llama"])
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one_bit_for_bit(config_file, name):
    path = config_file(name, **({"mtp_weight": 0.1} if name == "v3" else {}))
    whole = SftConfig.load(path, ["name=whole"])
    expected = sft.train(whole, resume=False)
    config = SftConfig.load(path)

    def stop(line):  # Ctrl-C, twice in the run's life
        if line.startswith(("step 2/", "step 5/")):
            os.kill(os.getpid(), signal.SIGINT)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sft.train(config, resume=True, say=stop)
    found = sft.train(config, resume=True)
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    for file in ("metrics.jsonl", "evals.jsonl"):
        assert without_times(read_lines(config.run_dir / file)) == without_times(read_lines(whole.run_dir / file))


def test_a_killed_run_does_again_what_its_newest_checkpoint_lacks(config_file):
    config = SftConfig.load(config_file("llama"))
    expected = (sft.train(config, resume=False) / "model.safetensors").read_bytes()
    metrics = without_times(read_lines(config.run_dir / "metrics.jsonl"))
    for step in (4, 6, 7):  # as if killed after step 3, the metrics of step 4 half written
        shutil.rmtree(config.run_dir / "checkpoints" / f"step-{step:06d}")
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (config.run_dir / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert (sft.train(config, resume=True) / "model.safetensors").read_bytes() == expected
    assert without_times(read_lines(config.run_dir / "metrics.jsonl")) == metrics


def test_only_the_newest_checkpoints_are_kept(config_file):
    config = SftConfig.load(config_file("llama", checkpoint={"every": 1, "keep": 2}))
    sft.train(config, resume=False)
    assert sorted(p.name for p in (config.run_dir / "checkpoints").iterdir()) == ["step-000006", "step-000007"]


def test_other_rows_are_no_continuation(config_file, tmp_path, monkeypatch, capsys):
    path = config_file("llama", epochs=1)
    assert run(monkeypatch, capsys, path)[0] == 0
    code, _, err = run(monkeypatch, capsys, path)
    assert code == 2 and "holds a run already; go on with --resume" in err
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(rows(1, 90)[0]) + "\n")
    code, _, err = run(monkeypatch, capsys, path, "--resume", "epochs=2")
    assert code == 2 and "was made with another data" in err


# --- several ranks ---------------------------------------------------------------------------------------------------


def test_two_ranks_are_one_which_goes_on_with_what_they_saved(config_file):
    """`torchrun -m rlzero.cli sft`, two processes on the CPU, against this process; FP32 sums in another order."""
    path = config_file(max_steps=3, mtp_weight=0.1, **{"evaluation.every": 1})
    one = SftConfig.load(path, ["name=one"])
    sft.train(one, resume=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(port), "-m", "rlzero.cli", "sft", str(path),
               "name=two", "parallel.dp=2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/3") == 1  # one rank speaks
    two = SftConfig.load(path, ["name=two"])
    for file, keys in (("metrics.jsonl", ("loss", "mtp_loss", "lr", "tokens", "rows")), ("evals.jsonl", ("loss",))):
        pair = [read_lines(config.run_dir / file) for config in (one, two)]
        assert len(pair[0]) == len(pair[1]) >= 3
        for line, other in zip(*pair, strict=True):
            assert all(other[key] == pytest.approx(line[key], rel=1e-3) for key in keys), (line, other)
    stored = [load_file(config.run_dir / "model" / "model.safetensors") for config in (one, two)]
    assert stored[0].keys() == stored[1].keys()
    for config in (one, two):
        sft.train(SftConfig.load(path, [f"name={config.name}", "max_steps=4"]), resume=True)
    last = [read_lines(config.run_dir / "metrics.jsonl")[3]["loss"] for config in (one, two)]
    assert last[1] == pytest.approx(last[0], rel=1e-3)
    AutoModelForCausalLM.from_pretrained(two.run_dir / "model")


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_the_rows_amount_to_and_starts_nothing(config_file, monkeypatch, capsys, tmp_path):
    code, out, err = run(monkeypatch, capsys, config_file(), "--dry-run")
    assert code == 0, err
    assert "rows       20 of" in out and "steps      7 of 6 rows, 2 epochs" in out
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(out.partition("rows  ")[0])
    assert SftConfig.load(resolved) == SftConfig.load(config_file())
    assert not (tmp_path / "runs").exists()


def test_the_shipped_miniature_runs_on_the_demos_base(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    changes = [f"output_dir={tmp_path}", "data.params.count=40", "data.evaluation_params.count=4", "max_steps=2",
               "tokens_per_step=1024", "threads=1"]  # fmt: skip
    code, out, err = run(monkeypatch, capsys, "configs/sft-demo.yaml", *changes)
    assert code == 0, err
    first, last = [line["loss"] for line in read_lines(tmp_path / "sft-demo" / "evals.jsonl")]
    assert last < first
    assert AutoTokenizer.from_pretrained(tmp_path / "sft-demo" / "model").chat_template


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tran=x", "data.tran: unknown key; did you mean data.train?"),
        ("rows_per_step=null", "neither is set; give the size of an optimizer step"),
        ("tokens_per_step=100", "both are set"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl: no such data file"),
        ("data.train={dir}/empty.jsonl", "the data set is empty"),
        ("data.train={dir}/broken.jsonl", "broken.jsonl:2: malformed JSON at column 10"),
        ("data.train=countdown", "countdown[0] (and 4095 more rows): none of the columns 'messages', or 'prompt' and"),
        ("data.messages_column=turns", "none of the columns 'turns'"),
        ("data.template=r1-zero", "(and 19 more rows): a conversation ('messages') needs data.template=chat"),
        ("data.max_tokens=10", "rows are longer than 10 tokens"),
        ("data.max_tokens=97", "do not fit in tokens_per_micro_batch 96"),
        ("data.max_tokens=100", "longer than the policy's context of 96 tokens"),
        ("data.held_out=3", "data.evaluation names held-out rows already"),
        ("data.evaluation=null", "evaluation.every: 3, but there are no held-out rows"),
        ("data.chat_template=none.jinja", "none.jinja cannot be read"),
        ("optimizer.total_steps=9", "optimizer.total_steps: follows from the rows"),
        ("optimizer.warmup_steps=7", "but the run has 7 steps; nothing is left"),
        ("balance=sequence", "balance: sequence with balance_weight 0; set both"),
        ("parallel.dp=4", "are 4 processes, found 1; start them with `torchrun --nproc-per-node 4"),
        ("policy.path=/nowhere", "policy.path: /nowhere: no such folder"),
        ("policy.path={bare}", "the policy's tokenizer has no chat template"),
        ("policy.path={endless}", "the tokenizer has no end-of-sequence token"),
    ],
)
def test_a_run_that_cannot_start_says_why_with_exit_code_2(
    config_file, folders, monkeypatch, capsys, tmp_path, override, message
):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for name, key in (("bare", "chat_template"), ("endless", "eos_token")):
        shutil.copytree(folders["v3"], tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(folders["v3"])
        setattr(tokenizer, key, None)
        (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(tmp_path / name)
    override = override.format(dir=tmp_path, bare=tmp_path / "bare", endless=tmp_path / "endless")
    code, _, err = run(monkeypatch, capsys, config_file(), override)
    assert code == 2 and message in err and "Traceback" not in err, err


def test_what_only_v3_has_is_refused_for_another_policy(config_file, monkeypatch, capsys):
    code, _, err = run(
        monkeypatch, capsys, config_file("llama"), "mtp_weight=0.1", "balance=batch", "balance_weight=1e-4", "epohs=2"
    )
    assert code == 2 and "3 mistakes" in err and "did you mean epochs?" in err
    assert "mtp_weight: is for DeepSeek-V3 models; this policy is a llama" in err
    assert "balance_weight: is for DeepSeek-V3 models" in err
