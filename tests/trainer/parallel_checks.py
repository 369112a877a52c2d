"""What test_parallel.py runs on every rank: one trainer on this rank alone beside one of all ranks, and how far they
come apart. Imported by the spawned processes, so it stands in a file of its own."""

import json
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainer.losses import LossOptions
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.parallel import experts as parallel_experts
from trainer.parallel.ranks import ParallelOptions, Rendezvous
from trainer.policy import PolicyOptions
from trainer.trainer import Trainer

V3 = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
OPTIONS = {  # "sent": the way of many expert ranks on two; "both": experts shared by two ranks
    "dp": {"dp": 2}, "ep": {"dp": 2, "ep": 2}, "sent": {"dp": 2, "ep": 2}, "both": {"dp": 4, "ep": 2},
}  # fmt: skip
RL = LossOptions(kl_coef=0.01, clip_low=0.2, clip_high=0.2, aggregation="token")


class Pair:
    """One rank of two (or four)."""

    def __init__(self, kind: str, rank: int, address: str, folder: Path, device: str):
        self.kind, self.rank, self.address, self.folder, self.device = kind, rank, address, folder, device

    def trainer(self, parallel: dict | None, dtype="float32", path=None, loss=RL, **optimizer) -> Trainer:
        """A trainer of this rank alone, or of both. Without momentum the first moment is the gradient, unclipped."""
        optimizer = {"lr": 1e-2, "betas": (0.0, 0.95), "max_grad_norm": 1e9, **optimizer}
        source = {"init": V3} if path is None else {"path": str(path)}
        return Trainer(
            PolicyOptions(**source, dtype=dtype), OptimizerOptions(**optimizer), loss,
            seed=5, device=self.device, parallel=ParallelOptions(**(parallel or {}), deadline_s=600),
            rendezvous=Rendezvous(self.rank, self.address),
        )  # fmt: skip

    def both(self, **changes) -> tuple[Trainer, Trainer]:
        options = OPTIONS[self.kind] | changes.pop("parallel", {})
        return self.trainer(None, **changes), self.trainer(options, **changes)


def samples(count=8, seed=0, routed=None):
    """`routed` gives the experts [k] of every token of sample i."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(rng.integers(3, 20))
        experts = None if routed is None else np.tile(np.array(routed(i), np.int16), (n + 4, 1, 1))
        made.append(
            Sample(
                rng.integers(0, 96, 4).tolist(), rng.integers(0, 96, n).tolist(), float(rng.normal()), [-4.5] * n,
                [(0, n)], routed_experts=experts,
            )
        )  # fmt: skip
    return made


def documents(count=8, seed=0):
    return [Sample((), [*s.prompt_tokens, *s.tokens], loss_on_prompt=True) for s in samples(count, seed)]


def moments(trainer: Trainer, kind="exp_avg") -> dict:
    """First moments, whole, by parameter."""
    found = {}
    for key, tensor in trainer.optimizer.state().items():
        what, _, name = key.partition("/")
        if what == kind:
            if trainer.ranks.size > 1:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                tensor = trainer.policy.whole(name, local)
            found[name] = tensor.clone()
    return found


def weights(trainer: Trainer) -> dict:
    return {name: tensor.clone() for name, tensor in trainer.weights(mtp=True)}


def apart(a: dict, b: dict) -> float:
    """Largest difference of any entry."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((x.float() - y.float()).abs().max().item() for x, y in zip(a.values(), b.values(), strict=True))


def metrics_apart(a: dict[str, float], b: dict[str, float]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(abs(a[name] - b[name]) for name in a)


# --- checks: each returns what test_parallel.py compares with its bound -----------------------------------------------


def policy_gradient(pair: Pair) -> dict[str, float]:
    """Three updates, with 4, 3 and 1 micro-batches (gaps to fill, a rank that has nothing else), old and reference
    log-probabilities computed."""
    minibatches = [pack(samples(), 40), pack(samples(6, seed=3), 40), pack(samples(2, seed=4), 64)]
    assert [len(m) for m in minibatches] == [4, 3, 1]
    one, two = pair.both(lr=1e-3)
    metrics = [t.step(minibatches) for t in (one, two)]
    return {"metrics": metrics_apart(*metrics), "gradients": apart(moments(one), moments(two))}


def in_bfloat16(pair: Pair) -> dict[str, float]:
    """Relative distance of every parameter's gradient. Experts are given: of about a hundred tokens one that takes
    another because of the last bit of a score would be a tenth of an expert's gradient."""
    one, two = pair.both(dtype="bfloat16", lr=1e-3)
    for t in (one, two):
        t.step([pack(samples(routed=lambda i: [[i % 4, (i + 1) % 4]] * 2), 40)])
    ours, theirs = moments(one), moments(two)
    return {name: float((a - theirs[name]).norm() / (a.norm() + 1e-9)) for name, a in ours.items()}


def every_way_of_summing(pair: Pair) -> dict[str, float]:
    minibatches = [pack(samples(), 40)]
    one = pair.trainer(None)
    one.step(minibatches)
    found = {}
    for way in ({"reshard": True}, {"reduce_each": True}, {"reshard": True, "reduce_each": True}):
        two = pair.trainer(OPTIONS[pair.kind] | way)
        two.step(minibatches)
        found["+".join(way)] = apart(moments(one), moments(two))
    return found


def pretraining(pair: Pair) -> dict[str, float]:
    """Cross-entropy with multi-token prediction, balance loss over the step's batch, router biases that move."""
    one, two = pair.both(router_bias_gamma=1e-2, loss=None, lr=1e-3)
    batches, single = pack(documents(6, seed=3), 40), pack(documents(2, seed=4), 64)
    assert len(batches) == 3 and len(single) == 1
    metrics = [t.next_token_step(batches, 0.3, "batch", 1e-2) for t in (one, two)]
    metrics = [m | {"one/" + k: v for k, v in t.next_token_step(single, 0.3, "sequence", 1e-2).items()}
               for m, t in zip(metrics, (one, two), strict=True)]  # fmt: skip
    biases = [torch.stack([r.bias for r in t.policy.module.routers()]) for t in (one, two)]
    return {
        "metrics": metrics_apart(*metrics),
        "gradients": apart(moments(one), moments(two)),
        "biases": (biases[0] - biases[1]).abs().max().item(),
        "moved": float((biases[0] != 0).any()),
    }


def empty_and_uneven_experts(pair: Pair) -> dict[str, float]:
    """Routing replay sends every token to two of the four experts, so that with expert ranks one of them gets nothing;
    then nearly every token."""
    found = {}
    routes = {
        "first": lambda i: [[0, 1]] * 2,
        "last": lambda i: [[2, 3]] * 2,
        "uneven": lambda i: [[0, 1]] * 2 if i else [[3, 0]] * 2,
    }
    for name, routed in routes.items():
        minibatches = [pack(samples(routed=routed), 40)]
        one, two = pair.both()
        metrics = [t.step(minibatches) for t in (one, two)]
        gradients = moments(one)
        assert name == "uneven" or any((g.flatten(1) == 0).all(1).any() for n, g in gradients.items() if "w13" in n)
        found[name] = max(apart(gradients, moments(two)), metrics_apart(*metrics))
    return found


def logprobs(pair: Pair) -> dict[str, float]:
    one, two = pair.both()
    batches = pack(samples(6, seed=3), 40)
    values = [t.logprobs(batches) for t in (one, two)]
    assert one.score([]) == two.score([]) == []
    scores = [t.score([[1, 2, 3], list(range(40)), [5, 6]], 0.7) for t in (one, two)]
    return {
        "logprobs": max((a - b).abs().max().item() for a, b in zip(*values, strict=True)),
        "scores": max(float(abs(a - b).max()) for a, b in zip(*scores, strict=True)),
    }


def whole_weights(pair: Pair) -> dict[str, float]:
    """Rank 0 alone gets them, in the checkpoint's order; a forward pass before leaves nothing gathered behind."""
    one, two = pair.both(dtype="bfloat16")
    two.logprobs(pack(samples(2), 64))
    found = weights(two)
    if pair.rank:
        return {"others": float(len(found))}
    assert list(found) == [name for name, _ in one.weights(mtp=True)]
    assert all(tensor.dtype == dict(one.weights(mtp=True))[name].dtype for name, tensor in found.items())
    return {"apart": apart(weights(one), found)}


def owned_weights(pair: Pair) -> dict[str, float]:
    """Each tensor on one rank, as one trainer alone has it; experts on the ranks that hold them; none is gathered."""
    one, two = pair.both(dtype="bfloat16")
    policy = two.policy
    expected, found = dict(one.weights(mtp=True)), list(policy.owned_weights(mtp=True))
    layout, owners = policy.layout(mtp=True), policy.owners(mtp=True)
    assert layout == [(name, tensor.shape, tensor.dtype) for name, tensor in expected.items()]
    assert [name for name, _ in found] == list(expected)
    assert [tensor is not None for _, tensor in found] == [owner == pair.rank for owner in owners]
    ep = policy.ranks.options.ep
    for name, owner in zip(expected, owners, strict=True):
        expert = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else 0
        assert owner == expert * ep // 4, name
    mine = {name: tensor.cpu() for name, tensor in found if tensor is not None}
    return {"apart": apart({name: expected[name] for name in mine}, mine) if mine else 0.0}


def resume(pair: Pair) -> dict[str, float]:
    """Two updates, save, load into trainers of one rank and of two, one more update: as if nothing had happened."""
    found = {}
    first, then = [pack(samples(), 40), pack(samples(6, seed=3), 40)], [pack(samples(seed=7), 40)]
    for dtype in ("float32", "bfloat16"):
        options = {"dtype": dtype, "betas": (0.9, 0.95)}
        one, two = pair.both(**options)
        for saved, name in ((one, "one"), (two, "two")):
            saved.step(first)
            saved.refresh_reference()
            folder = pair.folder / f"{pair.kind}-{dtype}-{name}" / "step-1"
            if saved is two or pair.rank == 0:
                saved.save(folder, {"at": 7})
            dist.barrier()
            goes_on = saved.step(then)
            for other, parallel in (("one", None), ("two", OPTIONS[pair.kind])):
                resumed = pair.trainer(parallel, **options)
                assert resumed.load(folder) == {"at": 7}
                metrics = resumed.step(then)
                key = f"{dtype} {name} to {other}"
                found[f"{key} metrics"] = metrics_apart(metrics, goes_on)
                ours, theirs = weights(saved), weights(resumed)
                if pair.rank == 0 or name == other == "one":
                    found[f"{key} weights"] = apart(ours, theirs)
    return found


def from_a_folder(pair: Pair) -> dict[str, float]:
    """Weights read straight into the shards."""
    one = pair.trainer(None)
    folder = pair.folder / f"{pair.kind}-folder"
    if pair.rank == 0:
        one.policy.save(folder)
    dist.barrier()
    two = pair.trainer(OPTIONS[pair.kind], path=folder)
    ours, theirs = weights(one), weights(two)
    bias = max((r.bias - s.bias).abs().max().item() for r, s in zip(
        one.policy.module.routers(), two.policy.module.routers(), strict=True))  # fmt: skip
    return {"apart": apart(ours, theirs) if pair.rank == 0 else 0.0, "biases": bias}


CHECKS = {
    check.__name__: check
    for check in (
        policy_gradient, in_bfloat16, every_way_of_summing, pretraining, empty_and_uneven_experts, logprobs,
        whole_weights, owned_weights, resume, from_a_folder,
    )
}  # fmt: skip


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def rank_main(rank: int, kind: str, address: str, folder: str, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind == "sent":
        parallel_experts.GATHER_RANKS = 1
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", init_method=f"tcp://{address}", rank=rank,
        world_size=OPTIONS[kind]["dp"], timeout=timedelta(seconds=600),
    )  # fmt: skip
    pair = Pair(kind, rank, address, Path(folder), device)
    found = {}
    for name, check in CHECKS.items():
        values = check(pair)
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, values)
        found[name] = {key: max(v[key] for v in every if key in v) for key in every[0] | every[1]}
    if rank == 0:
        (Path(folder) / f"{kind}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
