"""What test_parallel_pipeline.py runs on each of two ranks: a model in stages beside the whole one. Imported by the
spawned processes, so it stands in a file of its own."""

import copy
import dataclasses
import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_checks import V3, samples

from trainer.losses import LossOptions, policy_loss
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config
from trainer.packing import pack, to_device
from trainer.parallel.pipeline import SCHEDULES, Pipeline
from trainer.policy import PolicyOptions, V3Policy

CONFIG = {**V3, "num_hidden_layers": 5, "num_nextn_predict_layers": 0}
LOSS = LossOptions(kl_coef=0.0, clip_low=0.2, clip_high=0.2, aggregation="token")


def apart(schedule: str, device: torch.device) -> dict[str, float]:
    """Largest differences of gradients, losses, loads and log-probabilities between stages and the whole model."""
    options = PolicyOptions(init=CONFIG, dtype="float32")
    whole = V3Model(V3Config(**CONFIG)).init_weights(3)
    staged = Pipeline(copy.deepcopy(whole), options, schedule, dist.group.WORLD, device)
    policy = V3Policy(whole.to(device), options, device)
    batches = pack(samples(9), 40)  # five of different lengths: some are filled up, and the schedule too
    replayed = [[[0, 1]] * 4, [[3, 2]] * 4]
    batches[0] = dataclasses.replace(
        batches[0], routed_experts=torch.tensor(replayed[0], dtype=torch.int16).expand(len(batches[0].tokens), 4, 2)
    )
    batches = [to_device(batch, device) for batch in batches]
    losses: list[list[float]] = [[], []]

    def loss_of(which: int):
        def loss(owner: V3Policy, batch) -> torch.Tensor:
            value, _ = policy_loss(*owner.logprobs(batch, entropy=True), batch, LOSS)
            losses[which].append(value.item())
            return value

        return loss

    for batch in batches:
        loss_of(0)(policy, batch).backward()
    staged.run(batches, loss_of(1))
    load = staged.take_load()
    counted = policy.take_router_load()
    first = V3Config(**CONFIG).first_k_dense_replace
    expected = dict(whole.named_parameters())
    gradients = {name: (p.grad - expected[name].grad).abs().max().item() for name, p in staged.named_parameters()}
    with torch.no_grad():
        ours = [policy.logprobs(batch)[0].cpu() for batch in batches]
    theirs = staged.logprobs(batches)
    names = [None, None]
    dist.all_gather_object(names, list(gradients))
    assert sorted(names[0] + names[1]) == sorted(expected), "every parameter on one rank"
    found = {
        "load": max(float((counts - counted[layer - first]).abs().max()) for layer, counts in load.items()),
        "gradients": max(gradients.values()),
        "logprobs": max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)),
    }
    if staged.policy is not None:
        found["losses"] = max(abs(a - b) for a, b in zip(sorted(losses[0]), sorted(losses[1]), strict=True))
    return found


def rank_main(rank: int, address: str, folder: str, kind: str = "cpu") -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", init_method=f"tcp://{address}", rank=rank, world_size=2,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    results: dict[str, dict[str, float]] = {}
    for schedule in SCHEDULES:
        every: list = [None, None]
        dist.all_gather_object(every, apart(schedule, device))
        results[schedule] = {key: max(v[key] for v in every if key in v) for key in every[0] | every[1]}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(results))
    dist.destroy_process_group()
