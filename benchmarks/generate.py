"""Tokens per second of the torch engine beside transformers' `generate`: the demo's architecture, the same weights,
prompts and number of tokens, float32, one process.

    python benchmarks/generate.py [--json] [--threads 2] [--prompts 32] [--samples 8] [--tokens 64] [--repeats 3]

transformers gets its better setting of two (eager attention and experts; SDPA and grouped experts). The engines take
turns, and each counts its best run: other work on the machine only ever slows one down.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from rollout.engine import Request, Sampling, generate
from rollout.torch.engine import TorchEngine

DEMO = dict(
    vocab_size=200, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
    n_group=1, topk_group=1, routed_scaling_factor=1.0, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=32,
    qk_rope_head_dim=64, v_head_dim=32, first_k_dense_replace=0, max_position_embeddings=512, bos_token_id=0,
    eos_token_id=1, pad_token_id=2, num_nextn_predict_layers=0, initializer_range=0.05,
)  # fmt: skip


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Wall time and processor time of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def peers(folder: str, requests: list[Request], tokens: int) -> dict[str, Callable[[], None]]:
    """transformers' generate over all requests as one left-padded batch."""
    longest = max(len(r.prompt_tokens) for r in requests)
    ids = torch.tensor([[2] * (longest - len(r.prompt_tokens)) + list(r.prompt_tokens) for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt_tokens)) + [1] * len(r.prompt_tokens) for r in requests])

    def made(attention: str, experts: str) -> Callable[[], None]:
        model = DeepseekV3ForCausalLM.from_pretrained(
            folder, attn_implementation=attention, experts_implementation=experts
        ).eval()

        def work() -> None:
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
            )
            assert out.shape == (len(requests), longest + tokens)

        return work

    return {"eager": made("eager", "eager"), "sdpa, grouped": made("sdpa", "grouped_mm")}


def gap(engine: TorchEngine, folder: str, requests: list[Request]) -> float:
    """Mean |Δ log p| of sampled tokens between the engine and transformers' uncached forward."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    differences = []
    for rollout in generate(engine, requests):
        ids = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        differences.append(np.abs(logprobs[len(rollout.prompt_tokens) - 1 :].numpy() - rollout.logprobs).mean())
    return float(np.mean(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kernels", default="auto", choices=["auto", "native", "torch"])
    for name, default in (("threads", 2), ("prompts", 32), ("samples", 8), ("tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    random = np.random.default_rng(0)
    sampling = Sampling(options.tokens, ignore_eos=True)
    prompts = [tuple(random.integers(3, 200, random.integers(16, 31)).tolist()) for _ in range(options.prompts)]
    requests = [Request(f"p{i}", s, p, sampling) for i, p in enumerate(prompts) for s in range(options.samples)]
    written = len(requests) * options.tokens
    with tempfile.TemporaryDirectory() as folder:
        DeepseekV3ForCausalLM(DeepseekV3Config(**DEMO)).save_pretrained(folder)
        engine = TorchEngine(folder, kernels=options.kernels)
        others = peers(folder, requests, options.tokens)
        generate(engine, requests)
        first = {name: seconds(work) for name, work in others.items()}
        better = min(first, key=first.get)
        ours, theirs = [], [first[better]]
        for _ in range(options.repeats):
            ours.append(seconds(lambda: generate(engine, requests)))
        for _ in range(options.repeats - 1):
            theirs.append(seconds(others[better]))
            ours.append(seconds(lambda: generate(engine, requests)))
        difference = gap(engine, folder, requests[:: max(1, len(requests) // 8)])
    shape = f"{options.prompts} x {options.samples} x {options.tokens} tokens, {options.threads} threads"
    found = []
    # Processor time is the steadier one on a busy machine.
    for which, unit in enumerate(("tokens/s", "tokens/s of processor time")):
        mine, other = min(t[which] for t in ours), min(t[which] for t in theirs)
        found.append(
            {
                "name": f"generate, {shape}",
                "value": round(written / mine),
                "unit": unit,
                "peer": f"transformers generate ({better})",
                "peer_value": round(written / other),
                "ratio": round(other / mine, 2),
            }
        )
    found.append(
        {
            "name": "mean |delta logp|, engine against transformers",
            "value": difference,
            "unit": "nats",
            "peer": "bound",
            "peer_value": 1e-4,
            "ratio": round(difference / 1e-4, 5),
        }
    )
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for f in found:
        print(f"{f['name']}: {f['value']:.6g} {f['unit']}; {f['peer']}: {f['peer_value']:.6g}; ratio {f['ratio']}")


if __name__ == "__main__":
    main()
