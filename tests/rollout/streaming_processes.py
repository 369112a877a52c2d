"""The processes of test_streaming.py: ranks of a trainer that gather their weights, and engines' ends that receive
them. Each answers calls over a pipe. Imported by the spawned processes, so they stand in a file of their own."""

from __future__ import annotations

import os
import time
import traceback
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from rollout.transport.buckets import BucketViews
from rollout.transport.checksum import checksum
from rollout.transport.ipc import IpcReceiver, IpcSender
from rollout.transport.nccl import NcclReceiver, NcclSender
from rollout.transport.payload import Payload

V3 = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
OPTIONS = {"init": V3, "dtype": "bfloat16"}  # of the policy
SMALL = 16 << 10  # bytes a bucket: the weights take many


class Process:
    """A spawned process that answers calls of `kind`'s methods."""

    def __init__(self, kind: type, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_answer, args=(there, kind, arguments), daemon=True)
        self.process.start()

    def call(self, method: str, *arguments: Any) -> None:
        self.pipe.send((method, *arguments))

    def answer(self, deadline_s: float = 60.0) -> Any:
        """What the call returned, or the text of what it raised."""
        assert self.pipe.poll(deadline_s), f"no answer within {deadline_s:g} s"
        return self.pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def _answer(pipe, kind: type, arguments: tuple) -> None:
    torch.set_num_threads(1)
    made = kind(*arguments)
    while True:
        try:
            method, *given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(made, method)(*given))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc())


class TrainerRank:
    """One of two ranks over which the experts, or else all weights, are shared."""

    def __init__(self, rank: int, address: str, ep: int):
        from trainer.parallel.ranks import ParallelOptions, Ranks, Rendezvous

        self.ranks = Ranks(ParallelOptions(dp=2, ep=ep), torch.device("cpu"), Rendezvous(rank, address))
        self.policy: Any = None
        self.sender: Any = None

    def use(self, kind: str, timeout_s: float, receivers: int, payload: Payload = None) -> None:
        """From now on weights travel this way."""
        if self.sender is not None:
            self.sender.close()
        cpu, rest = torch.device("cpu"), {"bucket_bytes": SMALL, "timeout_s": timeout_s}
        if kind == "ipc":
            self.sender = IpcSender(cpu, receivers, payload, **rest)
        else:
            self.sender = NcclSender(cpu, receivers, payload, self.ranks.rank, **rest)

    def prepare(self, version: int) -> Any:
        """Weights drawn anew for each version."""
        from trainer.parallel.sharded_policy import load_sharded_policy
        from trainer.policy import PolicyOptions

        self.policy = load_sharded_policy(PolicyOptions(**OPTIONS), self.ranks, seed=version)
        return self.sender.prepare(self.policy.layout(), version, self.policy.owners())

    def send(self, damaged: int | None = None) -> float:
        """Seconds that it took. A byte of bucket `damaged` changes behind its checksums' back."""
        ipc = isinstance(self.sender, IpcSender)
        began_s = time.monotonic()
        honest, count = BucketViews.checksums, 0

        def damaging(views: BucketViews, bucket, out=None):
            nonlocal count
            found = honest(views, bucket, out)
            if count == damaged:
                views.buffer[0] ^= 1
            count += 1
            return found

        BucketViews.checksums = damaging
        try:
            self.sender.send(self.policy.weights() if ipc else self.policy.owned_weights())
        finally:
            BucketViews.checksums = honest
        return time.monotonic() - began_s


class EngineEnd:
    """Receives, and says what arrived."""

    def __init__(self):
        self.receiver: Any = None

    def use(self, kind: str, timeout_s: float) -> None:
        """From now on weights come this way."""
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = (IpcReceiver if kind == "ipc" else NcclReceiver)(timeout_s)

    def receive(self, update: Any, dies_after: int | None = None) -> dict[str, int]:
        """Checksums of what arrived, taken here; the process dies after so many tensors."""
        arrived, found = self.receiver.receive(update), {}
        for name, tensor in arrived:
            if len(found) == dies_after:
                os._exit(1)
            found[name] = checksum(tensor)
        assert {spec.name: spec.checksum for spec in arrived.sent} == found
        return found
