"""The table of docs/models.md, row by row, by comparing log-probabilities: the trainer's, packed and unpacked, those of
transformers' own code, of the torch engine, and of vLLM before and after updates. `python -m tests.models.test_table`
prints the table."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.engine import Request, Sampling, generate
from rollout.torch.engine import TorchEngine
from tests.models.folders import ARCHITECTURES, FORMS, make
from trainer.checkpoint.model_folder import REFUSED_BY_VLLM
from trainer.hf_model import hold_rotation
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, load_policy

ROWS = [*ARCHITECTURES, *FORMS]
EXACT = 1e-5  # nats at the worst token, float32 on all sides; measured 6e-6 (Gemma 2 in vLLM)
LONGEST = 200
IN_CI = ["Phi-3, LongRoPE", "tied, with a copy of the head", ".bin only"]
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
DRAW = np.random.default_rng(0)
SEQUENCES = [DRAW.integers(3, 250, n).tolist() for n in (20, 60, 33)]  # past windows of 16 and borders of 32, and not
REQUESTS = [
    Request(f"p{i}", 0, tuple(sequence[:12]), Sampling(5 + 9 * i, seed=1, ignore_eos=True))  # each ends at another time
    for i, sequence in enumerate(SEQUENCES * 2)
]


def open_policy(folder: Path):
    return load_policy(PolicyOptions(path=str(folder), dtype="float32", longest=LONGEST))


@torch.no_grad()
def score(policy, sequences: list[list[int]]) -> list[np.ndarray]:
    """The trainer's log-probabilities, all sequences in one pack."""
    (batch,) = pack([Sample((), sequence, loss_on_prompt=True) for sequence in sequences], 4096)
    values, _ = policy.logprobs(batch)
    parts = values.split(batch.bounds.diff().tolist())
    found = dict(zip(batch.sequence_ids.tolist(), parts, strict=True))
    return [found[i].numpy() for i in range(len(sequences))]


@torch.no_grad()
def stock(folder: Path) -> list[np.ndarray]:
    """By transformers' own model and eager attention, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    scores = []
    for sequence in SEQUENCES:
        tokens = torch.tensor([sequence])
        logits = hold_rotation(model, LONGEST)(tokens).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
        scores.append(np.concatenate([[0.0], chosen]))
    return scores


def apart(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The greatest difference at any token, in nats."""
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


def serves(engine, policy) -> bool:
    """Whether the engine's scores and the log-probabilities of what it writes are the trainer's."""
    written = generate(engine, REQUESTS)
    rescored = score(policy, [[*r.prompt_tokens, *r.tokens] for r in written])
    own = [np.array(r.logprobs) for r in written]
    return max(
        apart(engine.score(SEQUENCES), score(policy, SEQUENCES)),
        apart(own, [s[len(r.prompt_tokens) :] for s, r in zip(rescored, written, strict=True)]),
    ) < EXACT


@torch.no_grad()
def step(policy) -> list[tuple[str, torch.Tensor]]:
    """Moves every weight, as an update would, and returns copies of them all."""
    for parameter in policy.module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return [(name, tensor.clone()) for name, tensor in policy.weights()]


def cells(name: str, folder: Path) -> list[str]:
    """The row's cells but vLLM's."""
    make(name, folder)
    policy = open_policy(folder)
    together, alone = score(policy, SEQUENCES), [score(policy, [sequence])[0] for sequence in SEQUENCES]
    right = max(apart(together, alone), apart(together, stock(folder))) < EXACT
    engine = TorchEngine(folder, max_context=LONGEST)
    served = serves(engine, policy)
    engine.update(step(policy), 1)
    served = served and serves(engine, policy)
    return ["yes" if right else "no", "yes" if policy.packed else "padded", "yes" if served else "no"]


def vllm_cell(name: str, folder: Path, process) -> str:
    make(name, folder)
    if name in ARCHITECTURES and ARCHITECTURES[name][0] in REFUSED_BY_VLLM:
        return "no"
    policy = open_policy(folder)
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20}
    engine = process.VLLMEngine(folder, dtype="float32", max_context=LONGEST, max_batch=8, engine_args=arguments)
    try:
        served = serves(engine, policy)
        for version in (1, 2):  # vLLM's reload in place has gone wrong without an error
            engine.update(step(policy), version)
            served = served and serves(engine, policy)
    finally:
        engine.close()
    return "yes" if served else "no"


def documented(name: str) -> list[str]:
    """The cells of a row of the docs: trainer, packed, torch engine, vLLM."""
    (line,) = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("name", ROWS)
def test_trainer_and_torch_engine_do_what_the_table_says(tmp_path, name):
    assert cells(name, tmp_path) == documented(name)[:3]


@pytest.mark.timeout(170)
@pytest.mark.parametrize("name", [n if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_vllm_does_what_the_table_says(tmp_path, vllm_process, name):
    assert vllm_cell(name, tmp_path, vllm_process) == documented(name)[3]


if __name__ == "__main__":
    from tests.rollout.vllm_process import EngineProcess, started

    process = started(EngineProcess)
    for name in ROWS:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            row = [name, *cells(name, Path(one)), vllm_cell(name, Path(other), process)]
        print(f"| {' | '.join(row)} |", flush=True)
    process.shutdown()
