"""Speculative decoding in the real vLLM, the policy's layer of multi-token prediction as the draft: what is written
follows the policy, log-probabilities are the policy's, and updates reach the draft. The reference is the trainer's own
model in float32. A briefly trained model, so that drafts are accepted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.managers import BaseManager, RemoteError
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.engine import Request, Rollout, Sampling, generate
from rollout.probe import logprob_diff
from rollout.transport.ipc import IpcSender
from tests.rollout.test_vllm_engine import DTYPE, VOCAB, finish, install, near, save_tokenizer
from tests.rollout.vllm_process import ON_GPU, Engines, EngineUnderTest, started
from trainer.checkpoint import hf
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions
from trainer.trainer import Trainer

pytestmark = [pytest.mark.timeout(170), *([pytest.mark.gpu] if ON_GPU else [])]

CONFIG = V3Config(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    routed_scaling_factor=1.5, q_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32, num_nextn_predict_layers=1,
    max_position_embeddings=512, initializer_range=0.08, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
DRAFT = "model.layers.3."  # what the checkpoint calls the prediction layer
TEMPERATURE = 0.9


class SpeculatingEngine(EngineUnderTest):
    speculates_on_cpu = True  # with the build put right

    def __init__(self, *args, **options):
        if not ON_GPU:
            from tests.rollout import cpu_speculation

            cpu_speculation.install()
        super().__init__(*args, **options)


class SpeculatingProcess(BaseManager):
    pass


SpeculatingProcess.register("VLLMEngine", SpeculatingEngine)


def text(count: int, seed: int) -> list[Sample]:
    """Tokens that follow a fixed permutation four times in five: what there is to predict, and to draft."""
    rng = np.random.default_rng(seed)
    after = 3 + np.random.default_rng(0).permutation(VOCAB - 3)
    samples = []
    for _ in range(count):
        tokens = [int(rng.integers(3, VOCAB))]
        while len(tokens) < 64:
            tokens.append(int(after[tokens[-1] - 3] if rng.random() < 0.8 else rng.integers(3, VOCAB)))
        samples.append(Sample((), tokens, loss_on_prompt=True))
    return samples


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> tuple[V3Model, Path]:
    """The model and its folder. Its weights are such as the engine can hold."""
    options = OptimizerOptions(lr=3e-3)
    trainer = Trainer(PolicyOptions(init=CONFIG.to_hf(), dtype="float32"), options, seed=0, device="cpu")
    for step in range(60):
        metrics = trainer.next_token_step(pack(text(16, seed=step), 1024), mtp_weight=0.5)
    print(metrics)
    model, folder = trainer.policy.module, tmp_path_factory.mktemp("mtp")
    if ON_GPU:
        model.to(torch.bfloat16)
    hf.save_folder(model, folder)
    save_tokenizer(folder)
    return model.float(), folder


@pytest.fixture(scope="module")
def engines(policy) -> Iterator[Engines]:
    process = started(SpeculatingProcess)
    engines = Engines({"mtp": policy[1]}, process)
    yield engines
    engines.close()
    process.shutdown()


@pytest.fixture(scope="module")
def sender() -> Iterator[IpcSender]:
    device = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
    sender = IpcSender(device, payload=getattr(torch, DTYPE), bucket_bytes=64 << 10)
    yield sender
    sender.close()


@pytest.fixture
def engine(engines, policy, sender):
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    options = {"return_routed_experts": True} if ON_GPU else {}
    engine = engines.get("mtp", DTYPE, speculative_config=speculative, **options)
    install(engine, sender, weights(policy[0]), 0)
    yield engine
    for rollout in engine.interrupt():
        raise AssertionError(f"a test left request {rollout.id} running")


def weights(model: V3Model) -> dict[str, Tensor]:
    return dict(hf.named_checkpoint_tensors(model))


def requests(count: int = 24, **sampling) -> list[Request]:
    options = Sampling(**{"max_tokens": 40, "temperature": TEMPERATURE, "seed": 3, "ignore_eos": True, **sampling})
    return [Request(f"p{i}", 0, tuple(s.tokens[:5]), options) for i, s in enumerate(text(count, seed=1000))]


@torch.no_grad()
def distributions(model: V3Model, rollout: Rollout, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """The policy's log-probabilities of every token that could stand in the place of each sampled one, and what the
    prediction layer would draft there: its most likely token from the hidden state two tokens before."""
    tokens = torch.tensor([*rollout.prompt_tokens, *rollout.tokens])
    n, first = len(tokens), len(rollout.prompt_tokens)
    bounds = torch.tensor([0, n])
    hidden = model(tokens, torch.arange(n), bounds).hidden
    logprobs = (model.logits(hidden) / temperature).log_softmax(-1)
    (deeper,) = model.mtp(hidden, tokens, torch.arange(n), bounds)
    drafted = model.logits(deeper.hidden).argmax(-1)
    return logprobs[first - 1 : n - 1], drafted[first - 2 : n - 2]


def differences(model: V3Model, rollouts: list[Rollout], temperature: float = TEMPERATURE) -> dict[str, float]:
    ours = []
    for rollout in rollouts:
        rows = distributions(model, rollout, temperature)[0]
        ours.append(rows.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0].numpy())
    return logprob_diff([np.array(r.logprobs) for r in rollouts], ours, first=0)


def acceptance(rollouts: list[Rollout]) -> float:
    return sum(r.drafts[2] for r in rollouts) / sum(r.drafts[1] for r in rollouts)


def expected_acceptance(model: V3Model, rollouts: list[Rollout]) -> float:
    """A greedy draft is accepted with the probability that the policy gives it."""
    found = []
    for rollout in rollouts:
        logprobs, drafted = distributions(model, rollout)
        found.append(logprobs[1:].gather(1, drafted[1:, None])[:, 0].exp())  # the first token is never drafted
    return torch.cat(found).mean().item()


def test_logprobs_of_what_was_accepted_are_the_policys(engine, policy):
    rollouts = generate(engine, requests())
    assert near(differences(policy[0], rollouts))
    assert acceptance(rollouts) > 0.3, "hardly a draft was accepted: the test shows nothing"


def test_tokens_are_drawn_from_the_policy(engine, policy):
    """Over all places, log p of the token drawn is -entropy in the mean: a draft taken too often, or too seldom, moves
    it. 4 standard deviations; 3,840 tokens."""
    excess, variance = 0.0, 0.0
    for rollout in generate(engine, requests(96)):
        logprobs, _ = distributions(policy[0], rollout)
        p = logprobs.exp()
        mean = (p * logprobs).sum(1)
        excess += (torch.tensor(rollout.logprobs) - mean).sum().item()
        variance += ((p * logprobs.square()).sum(1) - mean.square()).sum().item()
    assert abs(excess) < 4 * variance**0.5


def test_greedy_takes_the_most_likely_token(engine, policy):
    for rollout in generate(engine, requests(4, temperature=0.0)):
        logprobs, _ = distributions(policy[0], rollout, 1.0)
        best = logprobs.max(1).values - logprobs.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        assert best.max() < (0.2 if ON_GPU else 1e-5)


def test_acceptance_is_what_the_policy_and_its_prediction_layer_make_likely(engine, policy):
    rollouts = generate(engine, requests(96))
    for rollout in rollouts:
        passes, drafted, accepted = rollout.drafts
        assert passes == drafted >= accepted and len(rollout.tokens) <= 1 + passes + accepted + 1
    assert acceptance(rollouts) == pytest.approx(expected_acceptance(policy[0], rollouts), abs=0.04)


def test_updates_reach_the_draft(engine, policy, sender):
    """A prediction layer that was made useless, and mended again; the policy itself stays."""
    model, folder = policy
    useless = hf.load_folder(folder, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in hf.named_checkpoint_tensors(useless):
        if name.startswith(DRAFT) and "embed" not in name and "head" not in name and tensor.ndim == 2:
            tensor.normal_(0.0, 0.3, generator=generator)
    if ON_GPU:
        useless.to(torch.bfloat16).float()
    good = acceptance(generate(engine, requests()))
    install(engine, sender, weights(useless), 1)
    rollouts = generate(engine, requests())
    assert near(differences(model, rollouts))
    assert acceptance(rollouts) < 0.1 < good
    install(engine, sender, weights(model), 2)
    assert acceptance(generate(engine, requests())) > good - 0.05


def test_updates_reach_the_policy_under_the_draft(engine, policy, sender):
    other = hf.load_folder(policy[1], torch.float32)
    generator = torch.Generator().manual_seed(2)
    for _, tensor in hf.named_checkpoint_tensors(other):
        if tensor.ndim == 2:
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    if ON_GPU:
        other.to(torch.bfloat16).float()
    for version in (3, 4):
        installed = install(engine, sender, weights(other), version)
        if ON_GPU:  # read back from the served model and from the draft
            assert installed.mode == "direct" and installed.verified == installed.tensors == len(weights(other))
        rollouts = generate(engine, requests())
        assert near(differences(other, rollouts)) and differences(policy[0], rollouts)["mean_abs"] > 0.02
        assert acceptance(rollouts) == pytest.approx(expected_acceptance(other, rollouts), abs=0.08)


def test_an_update_without_the_prediction_layer_is_refused(engine, policy):
    kept = [(name, tensor) for name, tensor in weights(policy[0]).items() if not name.startswith(DRAFT)]
    with pytest.raises(RuntimeError, match=r"ended without \d+ of .* the first: .model\.layers\.3"):
        engine.update(kept, 5)
    engine.update(list(weights(policy[0]).items()), 5)


def test_scoring_at_another_temperature_leaves_accepted_tokens_alone(engine, policy):
    model, _ = policy
    engine.submit(requests(4))
    sequences = [s.tokens for s in text(3, seed=7)]
    scores = engine.score(sequences, 0.5)
    rollouts = finish(engine)
    assert near(differences(model, rollouts))
    for sequence, score in zip(sequences, scores, strict=True):
        whole = Rollout("s", 0, tuple(sequence[:1]), sequence[1:], score[1:].tolist(), [], "length", "")
        assert near(differences(model, [whole], 0.5))


def test_same_seed_gives_the_same_tokens_whatever_runs_beside(engine):
    together = generate(engine, requests(4))
    if ON_GPU:  # see test_vllm_engine.py
        again = generate(engine, requests(4))
    else:
        again = [generate(engine, [request])[0] for request in requests(4)]
    assert [r.tokens for r in together] == [r.tokens for r in again]
    assert [r.drafts for r in together] == [r.drafts for r in again]


def test_interrupted_rollouts_add_up_their_drafts(engine, policy):
    wanted = requests(4, max_tokens=60)
    engine.submit(wanted)
    engine.completed(timeout_s=0.02)
    stopped = engine.interrupt()
    assert all(0 < len(r.tokens) < 60 for r in stopped)
    ended = generate(engine, [replace(r, partial=s) for r, s in zip(wanted, stopped, strict=True)])
    assert near(differences(policy[0], ended))
    for before, after in zip(stopped, ended, strict=True):
        assert all(a > b or a == b == 0 for a, b in zip(after.drafts[:2], before.drafts[:2], strict=True))
        assert len(after.tokens) == 60 and after.drafts[2] >= before.drafts[2]


if ON_GPU:

    def test_routing_of_accepted_tokens_is_that_of_the_trainer(engine, policy):
        """BF16 turns some choices; a record that is off by a token would turn most of them."""
        model, equal, count = policy[0], 0, 0
        for rollout in generate(engine, requests()):
            tokens = torch.tensor([*rollout.prompt_tokens, *rollout.tokens])
            n = len(tokens)
            with torch.no_grad():
                own = model(tokens, torch.arange(n), torch.tensor([0, n])).experts[:-1].sort(-1).values
            theirs = torch.from_numpy(rollout.routed_experts[:-1]).long().sort(-1).values
            assert (rollout.routed_experts[-1] == -1).all() and theirs.min() >= 0
            equal, count = equal + (own == theirs).all(-1).sum().item(), count + own[..., 0].numel()
        assert equal / count > 0.9


else:

    def test_the_cpu_build_as_it_is_refuses_speculation(policy, vllm_process):
        plain = Engines({"mtp": policy[1]}, vllm_process)
        with pytest.raises(RemoteError, match="gets the log-probabilities of speculative decoding wrong"):
            plain.get("mtp", DTYPE, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
