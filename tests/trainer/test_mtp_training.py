"""Multi-token prediction of two depths: losses and gradients against transformers' MTP layers in float64."""

import dataclasses

import pytest
import torch
from transformers.modeling_layers import MtpModel

from tests.trainer.test_model_parity import TINY, fused_names, random_model, transformers_twin
from trainer.checkpoint import hf
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, V3Policy

DEPTHS = 2
WEIGHT = 0.3
LENGTHS, PROMPT = (9, 14, 2, 3), 1  # documents shorter than a depth reaches are among them


@pytest.fixture(scope="module")
def policy():
    model = random_model(dataclasses.replace(TINY, num_nextn_predict_layers=DEPTHS))
    return V3Policy(model, PolicyOptions(init={}, dtype="float32"), torch.device("cpu"))


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, TINY.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Sample(ids[:PROMPT], ids[PROMPT:]) for ids in tokens]


def reference_losses(policy, documents):
    """Of the main head and of every depth: cross-entropy per token that is learned (arXiv 2412.19437, eq. 21-25), one
    document at a time through transformers' model and its MTP layers, in float64. Also the twin and its MTP layers."""
    model = policy.module
    twin = transformers_twin(model).double()
    layers = MtpModel(twin, DEPTHS).double().eval()
    state = {}
    for name, tensor in fused_names(dict(hf.named_checkpoint_tensors(model)), model.config).items():
        for depth in range(DEPTHS):
            rest = name.removeprefix(f"model.layers.{model.config.num_hidden_layers + depth}.")
            if rest == name or "embed_tokens" in rest or rest == "shared_head.head.weight":
                continue
            inner = rest if rest.split(".")[0] in ("enorm", "hnorm", "eh_proj") else f"mtp_block.{rest}"
            state[f"layers.{depth}.{inner.replace('mtp_block.shared_head.norm', 'post_norm')}"] = tensor.detach()
    assert not layers.load_state_dict(state, strict=False).unexpected_keys
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(1 + DEPTHS)]
    for sample in documents:
        tokens = torch.tensor([*sample.prompt_tokens, *sample.tokens])
        n = len(tokens)
        hidden = twin.model(tokens[None]).last_hidden_state
        for depth in range(1 + DEPTHS):
            kept = n - depth
            if kept < 2:
                break
            if depth:
                place = torch.arange(kept)[None]
                hidden = layers.layers[depth - 1](
                    twin.model.embed_tokens(tokens[depth:])[None],
                    hidden[:, :kept],
                    position_embeddings=twin.model.rotary_emb(hidden, place),
                    attention_mask=torch.full((1, 1, kept, kept), float("-inf"), dtype=torch.float64).triu(1),
                    position_ids=place,
                    past_key_values=None,
                )
            logprobs = twin.lm_head(hidden[0, :-1]).log_softmax(-1)
            targets = tokens[depth + 1 :]
            learned = torch.arange(depth + 1, n) >= PROMPT
            losses[depth] = losses[depth] - logprobs.gather(1, targets[:, None])[learned, 0].sum()
    total = sum(sample.loss_tokens for sample in documents)
    return [loss / total for loss in losses], twin, layers


def test_every_depths_loss_and_gradient_are_those_of_transformers(policy, documents):
    policy.module.zero_grad()
    parts = []
    batches = pack(documents, 16)
    assert len(batches) > 1
    for batch in batches:
        loss, metrics = policy.next_token_loss(batch, mtp_weight=WEIGHT)
        loss.backward()
        parts.append({**{name: value.item() for name, value in metrics.items()}, "whole": loss.item()})
    found = {name: sum(part[name] for part in parts) for name in parts[0]}
    (main, *depths), twin, layers = reference_losses(policy, documents)
    whole = main + WEIGHT / DEPTHS * sum(depths)
    assert found["loss"] == pytest.approx(main.item(), rel=1e-5)
    for depth, loss in enumerate(depths, start=1):
        assert found[f"mtp_loss/{depth}"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["mtp_loss"] == pytest.approx(sum(loss.item() for loss in depths) / DEPTHS, rel=1e-5)
    assert found["whole"] == pytest.approx(whole.item(), rel=1e-5)
    whole.backward()
    model = policy.module
    pairs = [(model.norm.weight, twin.model.norm.weight), (model.head, twin.lm_head.weight)]
    for depth, ours in enumerate(model.mtp_layers):
        theirs = layers.layers[depth]
        pairs += [
            (ours.eh_proj.weight, theirs.eh_proj.weight), (ours.enorm.weight, theirs.enorm.weight),
            (ours.norm.weight, theirs.post_norm.weight),
            (ours.block.ffn.router.weight, theirs.mtp_block.mlp.gate.weight),
        ]  # fmt: skip
    for own, reference in pairs:
        error = (own.grad.double() - reference.grad).abs().max()
        assert error < 1e-4 * reference.grad.abs().max() and reference.grad.abs().max() > 0


def test_the_embedding_learns_from_every_depth(policy, documents):
    gradients = []
    for weight in (0.0, WEIGHT):
        policy.module.zero_grad()
        for batch in pack(documents, 64):
            policy.next_token_loss(batch, mtp_weight=weight)[0].backward()
        gradients.append(policy.module.embed.grad.clone())
    last = documents[1].tokens[-2]  # read as a later token by a depth
    assert not torch.equal(gradients[0][last], gradients[1][last])
    for layer in policy.module.mtp_layers:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (layer.eh_proj.weight, layer.norm.weight))
