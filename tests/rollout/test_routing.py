"""The experts that the torch engine returns are those the trainer would choose, and replaying them takes router
differences out of the log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.engine import Request, Rollout, Sampling, generate
from rollout.torch.engine import TorchEngine
from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
from trainer.model.moe import Router
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

CONFIG = V3Config(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, kv_lora_rank=40,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, eos_token_id=1,
    max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> V3Model:
    model = V3Model(CONFIG).init_weights(3)
    for module in model.modules():
        if isinstance(module, Router):
            module.bias.uniform_(-0.1, 0.1)
    return model


@pytest.fixture(params=["latent", "expanded"])
def engine(request, model, tmp_path) -> TorchEngine:
    save_folder(model, tmp_path / "model")
    return TorchEngine(tmp_path / "model", cache=request.param, max_batch=3, return_routed_experts=True)


def requests(count: int = 7) -> list[Request]:
    """Of several lengths, so that rows end and are moved; the first two share a prompt."""
    prompts = [tuple((7 * max(i, 1) + 3 * j) % 59 + 2 for j in range(3 + max(i, 1))) for i in range(count)]
    return [
        Request(f"p{i}", 0, prompt, Sampling(4 + 3 * (i % 4), seed=i, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def trained(model: V3Model, rollout: Rollout, replay: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The trainer's routing of every token, and its log-probabilities of the completion."""
    tokens = [*rollout.prompt_tokens, *rollout.tokens]
    chosen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, routing: chosen.append(routing.experts))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    routed = torch.from_numpy(rollout.routed_experts) if replay else None
    n = len(tokens)
    out = model(torch.tensor(tokens), torch.arange(n), torch.tensor([0, n]), routed)
    for hook in hooks:
        hook.remove()
    logprobs = model.logits(out.hidden).double().log_softmax(-1)
    picked = logprobs[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0].numpy()
    return torch.stack(chosen, 1).numpy(), picked[len(rollout.prompt_tokens) - 1 :]


def assert_routed_like_the_trainer(model: V3Model, rollout: Rollout) -> None:
    theirs, logprobs = trained(model, rollout)
    ours = rollout.routed_experts
    assert ours.dtype == np.int16 and ours.shape == theirs.shape
    assert (ours[-1] == -1).all()  # the last token was sampled and never read
    np.testing.assert_array_equal(np.sort(ours[:-1]), np.sort(theirs[:-1]))
    np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-5)


def test_every_token_went_where_the_trainer_sends_it(engine, model):
    for rollout in generate(engine, requests()):
        assert_routed_like_the_trainer(model, rollout)


def test_a_continued_rollout_returns_the_routing_of_all_its_tokens(engine, model):
    wanted = requests(3)
    engine.submit(wanted)
    engine.completed(timeout_s=0.0)
    stopped = {r.id: r for r in engine.interrupt()}
    assert all(r.routed_experts is None for r in stopped.values())
    for rollout in generate(engine, [replace(w, partial=stopped[w.id]) for w in wanted if w.id in stopped]):
        assert_routed_like_the_trainer(model, rollout)


def test_sleep_keeps_the_routing_of_running_requests(engine, model):
    engine.submit(requests(2))
    engine.completed(timeout_s=0.0)
    engine.sleep()
    engine.wake()
    while ended := engine.completed():
        for rollout in ended:
            assert_routed_like_the_trainer(model, rollout)


def test_replay_takes_a_difference_of_routers_out_of_the_logprobs(engine, model):
    """A router's bias only selects (V3 report, equation 16): with the engine's choices replayed, a trainer with other
    biases computes the engine's log-probabilities."""
    other = V3Model(CONFIG)
    other.load_state_dict(model.state_dict())
    for module in other.modules():
        if isinstance(module, Router):
            module.bias += 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    without, replayed = [], []
    for rollout in generate(engine, requests()):
        without.append(np.abs(trained(other, rollout)[1] - rollout.logprobs).mean())
        replayed.append(np.abs(trained(other, rollout, replay=True)[1] - rollout.logprobs).max())
    assert np.mean(without) > 1e-2 and max(replayed) < 1e-5


def test_updates_reach_the_routing(engine, model):
    other = V3Model(CONFIG).init_weights(9)
    engine.update(named_checkpoint_tensors(other), 1)
    for rollout in generate(engine, requests(3)):
        assert_routed_like_the_trainer(other, rollout)


def test_native_kernels_return_no_routing_and_say_so(model, tmp_path):
    save_folder(model, tmp_path / "model")
    with pytest.raises(ValueError, match="native kernels .* return no routing"):
        TorchEngine(tmp_path / "model", cache="expanded", kernels="native", return_routed_experts=True)
