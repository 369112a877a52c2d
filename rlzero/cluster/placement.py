"""Where the processes of a run work: which GPU each has, what they share, and how weights travel between them.

Colocated: rollout worker i has the GPU of trainer rank i, and both use it in turn or at once. Disaggregated: trainer
ranks and engines have GPUs of their own. `cluster.placement: auto` chooses; nothing here starts anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from rlzero.config.read import Conflict
    from rlzero.config.rl import Config

Kind = Literal["colocated", "disaggregated"]


@dataclass(frozen=True)
class Choice:
    """What `cluster.placement` and `rollout.transport` come to, and why."""

    kind: Kind
    reason: str
    transport: str


@dataclass(frozen=True)
class Process:
    """One process of a run: the bundle of the placement group that it lives in, and its share of that."""

    bundle: int
    resources: dict[str, float]


@dataclass(frozen=True)
class Placement:
    """What each process of a run gets: Ray resources and CPU threads."""

    choice: Choice
    ranks: tuple[Process, ...]
    workers: tuple[Process, ...]
    rank_threads: int
    worker_threads: int

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What has to be found on one node each; processes of one bundle share its GPU."""
        processes = [*self.ranks, *self.workers]
        found: list[dict[str, float]] = [{} for _ in range(1 + max(p.bundle for p in processes))]
        for process in processes:
            for name, amount in process.resources.items():
                found[process.bundle][name] = found[process.bundle].get(name, 0.0) + amount
        return found

    def of_bundle(self, bundle: int) -> str:
        """Who lives in a bundle, in words."""
        ranks = [f"trainer rank {i}" for i, p in enumerate(self.ranks) if p.bundle == bundle]
        workers = [f"rollout worker {i}" for i, p in enumerate(self.workers) if p.bundle == bundle]
        return " and ".join(ranks + workers)

    @property
    def rank_of_worker(self) -> list[int]:
        """For every rollout worker the trainer rank on its GPU; rank 0, which has all weights, where there is none."""
        homes = {process.bundle: rank for rank, process in enumerate(self.ranks)}
        return [homes.get(worker.bundle, 0) for worker in self.workers]

    @property
    def shares_gpus(self) -> bool:
        return self.choice.kind == "colocated" and "GPU" in self.ranks[0].resources

    @property
    def local_cpus(self) -> int:
        """CPUs that a Ray of the run's own offers: this machine's, or what the run needs to be placed, if that is more.
        Processes that take turns share cores; their threads are counted for that."""
        return max(os.cpu_count() or 1, math.ceil(sum(bundle["CPU"] for bundle in self.bundles)))

    def lines(self, reward_processes: int) -> list[str]:
        """The placement as lines of text."""
        each = [f"{len(self.ranks)} trainer rank(s): {resources(self.ranks[0].resources)} each"]
        each.append(f"{len(self.workers)} rollout worker(s): {resources(self.workers[0].resources)} each")
        return [
            f"placement  {self.choice.kind}: {self.choice.reason}",
            f"             {'; '.join(each)}; {reward_processes} reward processes",
            f"             weights travel by {self.choice.transport}",
        ]

    def threads_line(self, together: bool, cores: int | None = None) -> str:
        """How the processes share this machine's cores, in a line; `together`: trainer and workers work at once."""
        cores, count = cores or os.cpu_count() or 1, len(self.workers)
        trained, written = len(self.ranks) * self.rank_threads, count * self.worker_threads
        busiest = trained + written if together else max(trained, written)
        line = (
            f"threads    each of {len(self.ranks)} trainer rank(s) {self.rank_threads}, each of {count} rollout "
            f"worker(s) {self.worker_threads}, {'at the same time' if together else 'in turn'}: at most {busiest} busy "
            f"on {cores} core(s)"
        )
        if busiest > cores:
            line += "; more than there are, so they slow each other down"
        if self.local_cpus > cores:
            line += f"; a Ray of the run's own is told of {self.local_cpus} CPUs so that all of them are placed"
        return line


def on_gpus(config: Config) -> bool:
    """Whether trainer and engines work on GPUs. `device: auto` asks the machine that this runs on."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def engine_gpus(config: Config) -> int:
    """GPUs of one engine, a process of vLLM on each: its tensor parallel size times its pipeline parallel size."""
    asked = [config.rollout.engine_args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    return math.prod(size if isinstance(size, int) and size > 0 else 1 for size in asked)


def choose(config: Config, gpus: int | None = None) -> Choice:
    """The placement and the transport of `config`. `gpus` is how many there are, None where that is not known (a
    cluster's are counted when it is joined)."""
    if not on_gpus(config):
        kind: Kind = "colocated" if config.cluster.placement == "colocated" else "disaggregated"
        return _with_transport(config, kind, "on CPUs, where every process has memory of its own", "nccl")
    ranks, workers, each = config.parallel.ranks, config.rollout.workers, engine_gpus(config)
    needed = ranks + workers * each
    if config.cluster.placement != "auto":
        kind, reason = config.cluster.placement, "asked for"
    elif each > 1:
        kind, reason = "disaggregated", f"an engine takes {each} GPUs (tensor_parallel_size)"
    elif workers > ranks:
        kind, reason = "disaggregated", f"there are more rollout workers ({workers}) than trainer ranks ({ranks})"
    elif config.staleness == 0:
        kind, reason = "colocated", "staleness 0, so either trainer or engines work, and each has every GPU meanwhile"
    elif gpus is not None and gpus < needed:
        kind = "colocated"
        reason = f"staleness {config.staleness} would have {needed} GPUs, so that both work at once; there are {gpus}"
    else:
        kind = "disaggregated"
        reason = f"staleness {config.staleness}, so trainer and engines work at once, each on GPUs of its own"
    return _with_transport(config, kind, reason, "ipc" if kind == "colocated" else "nccl")


def _with_transport(config: Config, kind: Kind, reason: str, transport: str) -> Choice:
    asked = config.rollout.transport
    return Choice(kind, reason, transport if asked == "auto" else asked)


def plan(config: Config, cores: int | None = None, gpus: int | None = None, trainer: bool = True) -> Placement:
    """The placement that `config` asks for. Synchronous runs on a CPU take turns, so trainer and workers may each use
    every core; where they work at the same time the cores are shared out. `cores` and `gpus` None: this machine's.
    Without a `trainer` (an evaluation) every worker has its GPUs to itself."""
    cores = cores or os.cpu_count() or 1
    if gpus is None and config.cluster.address is None and on_gpus(config):
        gpus = torch.cuda.device_count() or None
    choice = choose(config, gpus) if trainer else Choice("disaggregated", "engines alone", "none")
    ranks, workers, cuda = config.parallel.ranks * trainer, config.rollout.workers, on_gpus(config)
    shared = min(ranks, workers) if choice.kind == "colocated" else 0
    taking_turns = config.staleness == 0

    def process(bundle: int, gpu: float) -> Process:
        return Process(bundle, {"CPU": 1.0, **({"GPU": gpu} if cuda else {})})

    return Placement(
        choice=choice,
        # Halves, so that both get the bundle's only GPU; Ray counts shares and enforces none.
        ranks=tuple(process(i, 0.5 if i < shared else 1.0) for i in range(ranks)),
        workers=tuple(
            process(i, 0.5) if i < shared else process(ranks + i - shared, float(engine_gpus(config)))
            for i in range(workers)
        ),
        rank_threads=config.threads or max(1, cores // (max(1, ranks) if taking_turns else ranks + workers)),
        worker_threads=config.threads or max(1, cores // (workers if taking_turns else ranks + workers)),
    )


def conflicts(config: Config, policy: dict[str, Any]) -> Iterator[Conflict]:
    """Contradictions between ranks, engines, placement and transport. `policy`: what its config.json says, if it is
    there."""
    ranks, workers, rollout = config.parallel.ranks, config.rollout.workers, config.rollout
    choice, each = choose(config), engine_gpus(config)
    colocated = choice.kind == "colocated"
    where = ("cluster.placement", "rollout.workers", "rollout.engine_args", "parallel", "device", "staleness")
    if colocated and each > 1:
        yield (
            where,
            f"cluster.placement: colocated, but an engine of tensor_parallel_size {each} would share {each} GPUs with "
            "as many trainer ranks, and sleep and weights are handed over one GPU at a time; use "
            "cluster.placement=disaggregated, or engines of one GPU each",
        )
    if colocated and workers > ranks:
        yield (
            where,
            f"cluster.placement: colocated, but {workers} rollout workers cannot share the GPUs of {ranks} trainer "
            f"rank(s); lower rollout.workers, raise parallel.dp to {workers}, or use cluster.placement=disaggregated",
        )
    level = rollout.engine_args.get("sleep_level")
    if level and config.staleness:
        yield (
            ("rollout.engine_args", "staleness"),
            f"rollout.engine_args: sleep_level {level}, but with staleness {config.staleness} engines write while the "
            "trainer trains and cannot sleep; leave it out, or set staleness=0",
        )
    if on_gpus(config):
        contradiction = {"ipc": "disaggregated", "nccl": "colocated"}.get(rollout.transport)
        if contradiction == choice.kind:
            why = {
                "ipc": "is for processes that share a GPU; here each has its own",
                "nccl": "cannot broadcast between two processes on one GPU",
            }
            yield (
                ("rollout.transport", *where),
                f"rollout.transport: {rollout.transport} {why[rollout.transport]} (placement {choice.kind}: "
                f"{choice.reason}); leave it out, or set cluster.placement",
            )
        if level and not colocated:
            yield (
                where,
                f"rollout.engine_args: sleep_level {level}, but the engines have GPUs of their own (placement "
                f"disaggregated: {choice.reason}) and nobody would use the memory; leave it out",
            )
    yield from _training_conflicts(config, policy)


def _training_conflicts(config: Config, policy: dict[str, Any]) -> Iterator[Conflict]:
    ranks, ep, experts = config.parallel.ranks, config.parallel.ep, policy.get("n_routed_experts")
    if ranks > 1 and policy.get("model_type", "deepseek_v3") != "deepseek_v3":
        yield (
            ("parallel", "policy.path"),
            f"parallel.dp: {ranks} trainer ranks train DeepSeek-V3 models only, and {config.policy.path} is of type "
            f"{policy['model_type']}; leave parallel out",
        )
    elif isinstance(experts, int) and experts % ep:
        yield (
            ("parallel", "policy.path"),
            f"parallel.ep: {ep} ranks cannot share out the {experts} routed experts of {config.policy.path} evenly; "
            "choose parallel.ep that divides both them and parallel.dp",
        )
    if ranks > 1 and config.optimizer.algorithm == "muon":
        yield (
            ("parallel", "optimizer.algorithm"),
            f"optimizer.algorithm: muon needs whole matrices, and {ranks} trainer ranks hold parts of them; use adamw, "
            "or parallel.dp=1",
        )


def resources(bundle: dict[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in sorted(bundle.items())) or "nothing"
