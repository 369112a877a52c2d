"""Seconds of a weight sync from two ranks of a trainer, which gather their weights while they travel, into two engines.

    python benchmarks/weight_sync_streamed.py [--gpus 2|4] [--fp8] [--kill] [--json FILE] [--tiny]

The model of benchmarks/weight_sync.py, sharded over two ranks (dp 2, ep 2). On two GPUs each rank has a vLLM engine
beside it, and serves it from its own gather through CUDA IPC. On four the engines have GPUs of their own, and each
rank broadcasts the experts that it holds to both (NCCL cannot put two members of a group on one GPU). Weights are
perturbed before every sync; after it each engine's log-probabilities are compared with those of the float32 decoder on
the gathered weights, and every tensor is read back. "All told" runs from `prepare` until both engines have answered.
`--kill` ends with an engine that dies in the middle of a sync. `--tiny` is a small model, for a try on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.weight_sync import FIGURES, decoder_logprobs, meant, model_config, part, say
from benchmarks.weight_sync_engine import REPEATS, Engine, synchronize

KILL_S = 15.0  # how long both sides wait for an engine that was killed


def save_model(tiny: bool, folder: str, device: torch.device) -> None:
    """Random weights, as the engines and the trainer start with."""
    from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
    from trainer.model.v3 import V3Model

    with torch.device(device):
        model = V3Model(model_config(tiny)).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in named_checkpoint_tensors(model):
        if tensor.ndim == 1:
            tensor.fill_(0.0 if "bias" in name else 1.0)
        else:
            tensor.normal_(0.0, model.config.initializer_range, generator=generator)
    save_folder(model, folder)


class Rank:
    """One rank of the trainer and the engine that it drives."""

    def __init__(self, rank: int, address: str, folder: str, options: argparse.Namespace):
        from rollout.probe import probe_sequences
        from rollout.torch.decode_v3 import V3Decoder
        from trainer.parallel.ranks import ParallelOptions, Ranks, Rendezvous
        from trainer.parallel.sharded_policy import load_sharded_policy
        from trainer.policy import PolicyOptions

        self.options, on_gpu = options, torch.cuda.is_available()
        self.device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        self.ranks = Ranks(ParallelOptions(dp=2, ep=2, deadline_s=300), self.device, Rendezvous(rank, address))
        if rank == 0:
            save_model(options.tiny, folder, self.device)
        self.ranks.barrier()
        self.engine = self._engine(folder)
        self.policy = load_sharded_policy(PolicyOptions(path=folder, dtype="bfloat16"), self.ranks)
        self.probe = probe_sequences(self.policy.module.config.vocab_size, without=(0, 1, 2))
        self.decoder = None
        if rank == 0:
            self.decoder = V3Decoder(self.policy.module.config, dtype=torch.float32, device=str(self.device))
        self.sender = self._sender()
        self.version = 0
        self.engine.ready()

    def _engine(self, folder: str) -> Engine:
        environment = {"VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0", "NCCL_NVLS_ENABLE": "0"}
        environment |= {"VLLM_USE_DEEP_GEMM": "0"}
        arguments: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}
        if self.device.type == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = str(self.ranks.rank + (2 if self.options.gpus == 4 else 0))
            arguments |= {"kv_cache_memory_bytes": 2 << 30, "gpu_memory_utilization": 0.3}
        if self.options.fp8:
            arguments["quantization"] = "fp8"
        context = 500 if self.options.tiny else 2048
        return Engine(folder, {"dtype": "bfloat16", "max_context": context, "engine_args": arguments}, environment)

    def _sender(self) -> Any:
        from rollout.transport.ipc import IpcSender
        from rollout.transport.nccl import NcclSender

        payload: Any = "fp8" if self.options.fp8 else None
        if self.options.gpus == 4:
            return NcclSender(self.device, 2, payload, self.ranks.rank)
        return IpcSender(self.device, payload=payload)

    @torch.no_grad()
    def perturb(self) -> None:
        """Every weight, anew; what all ranks have is perturbed alike."""
        self.version += 1
        for name, weight in self.policy.parts().items():
            shared = self.policy.mesh_of(name) is None
            seed = zlib.crc32(f"{self.version} {name} {0 if shared else self.ranks.rank}".encode())
            generator = torch.Generator(self.device).manual_seed(seed)
            scale = 0.3 * self.policy.module.config.initializer_range if weight.ndim > 1 else 0.1
            noise = torch.empty(weight.shape, device=self.device).normal_(0.0, scale, generator=generator)
            weight.add_(noise.to(weight.dtype))

    def sync(self, kill_after: int | None = None) -> dict[str, Any]:
        """One sync; seconds are this rank's. `kill_after` so many tensors this rank's engine is killed."""
        from rollout.transport.nccl import merged

        synchronize()
        self.ranks.barrier()
        began_s = time.perf_counter()
        nccl = self.options.gpus == 4
        update = self.sender.prepare(self.policy.layout(), self.version, self.policy.owners())
        if nccl:
            update = merged(self.everyones(update))
        self.engine.ask("sync", update)
        prepared_s = time.perf_counter()
        weights = self.policy.owned_weights() if nccl else self.policy.weights()
        self.sender.send(weights if kill_after is None else self._killing(weights, kill_after))
        sent_s = time.perf_counter()
        answer = self.engine.answer("sync", 60)
        ended_s = time.perf_counter()
        found = {"all_s": ended_s - began_s, "prepare_s": prepared_s - began_s, "send_s": sent_s - prepared_s}
        return answer | found | {"engine_s": self.engine.took_s}

    def _killing(self, weights: Iterable[Any], after: int) -> Iterator[Any]:
        for count, pair in enumerate(weights):
            if count == after:
                self.engine.process.kill()
                self.engine.process.join()
            yield pair

    def everyones(self, value: Any) -> list[Any]:
        values: list[Any] = [None, None]
        dist.all_gather_object(values, value)
        return values

    def gap(self) -> list[float]:
        """Of both engines from the gathered weights."""
        from rollout.probe import logprob_diff

        weights, expected = self.policy.weights(), None
        if self.decoder is not None:
            expected = decoder_logprobs(self.decoder, meant(weights, self.options.fp8), self.probe)
        for _ in weights:  # the others take part to the end
            pass
        expected = self.ranks.agree(expected)
        return self.everyones(logprob_diff(self.engine("score", self.probe), expected)["mean_abs"])


def measure(me: Rank) -> None:
    show = say if me.ranks.rank == 0 else (lambda *_: None)
    for _ in range(3):
        me.perturb()
        every = me.everyones(me.sync())
        show(f"sync {me.version}, all told", max(one["all_s"] for one in every), "s")
        show(f"sync {me.version}, mode", [one["mode"] for one in every])
        show(f"sync {me.version}, read back and equal", [f"{one['verified']} of {one['tensors']}" for one in every])
        show(f"sync {me.version}, gaps to the new weights", [round(g, 5) for g in me.gap()], "nats")
    runs = []
    for _ in range(REPEATS):
        me.perturb()
        runs.append(me.everyones(me.sync()))
    for key in ("all_s", "prepare_s", "send_s", "engine_s"):
        worst = [max(one[key] for one in every) for every in runs]
        show(f"sync, {key}, least and median of {REPEATS}", f"{min(worst):.4g} {statistics.median(worst):.4g}", "s")
    gathers = {"whole weights on every rank": me.policy.weights, "owned weights": me.policy.owned_weights}
    for name, gather in gathers.items():
        times_s = []
        for _ in range(REPEATS):
            synchronize()
            me.ranks.barrier()
            began_s = time.perf_counter()
            for _ in gather():
                pass
            synchronize()
            times_s.append(time.perf_counter() - began_s)
        show(f"gather alone, {name}", max(me.everyones(min(times_s))), "s")


def measure_death(me: Rank) -> None:
    """The second rank's engine is killed while the weights travel."""
    show = say if me.ranks.rank == 0 else (lambda *_: None)
    me.sender.timeout_s = KILL_S
    if (group := getattr(me.sender, "_group", None)) is not None:
        group.timeout_s = KILL_S
    me.engine("timeout", KILL_S)
    me.perturb()
    began_s = time.perf_counter()
    try:
        me.sync(kill_after=len(me.policy.layout()) // 2 if me.ranks.rank == 1 else None)
        told = "nothing went wrong"
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[-300:]}"
    for rank, (line, took_s) in enumerate(me.everyones((told, time.perf_counter() - began_s))):
        show(f"an engine was killed: rank {rank} after {took_s:.1f} s", line)


def main(rank: int, address: str, folder: str, options: argparse.Namespace) -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    limit = timedelta(seconds=300)
    dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=2, timeout=limit)
    me = None
    try:
        with part(f"start of rank {rank}"):
            me = Rank(rank, address, folder, options)
        if not all(me_there for me_there in _everyone(me is not None)):
            return
        with part(f"syncs of rank {rank}"):
            measure(me)
        if options.kill:
            with part(f"death of an engine, rank {rank}"):
                measure_death(me)
    finally:
        if me is not None:
            me.engine.close()
        if options.json and rank == 0:
            options.json.write_text(json.dumps(FIGURES, indent=1, default=str) + "\n")
    os._exit(0)  # a group that lost a member may never end by itself


def _everyone(value: Any) -> list[Any]:
    values: list[Any] = [None, None]
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--gpus", type=int, default=2, choices=(2, 4))
    parser.add_argument("--fp8", action="store_true", help="block-FP8 into engines that hold it")
    parser.add_argument("--kill", action="store_true", help="at the end, kill an engine in the middle of a sync")
    parser.add_argument("--tiny", action="store_true")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="rlzero-weight-sync-") as scratch:
        multiprocessing.spawn(main, (free, scratch, parser.parse_args()), nprocs=2)
