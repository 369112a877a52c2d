"""Rollout workers as real Ray actors, against the same engine in this process."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from rollout.engine import Request, Sampling, generate
from rollout.probe import logprob_diff, probe_sequences
from rollout.torch.engine import TorchEngine
from rollout.transport.buckets import BucketViews
from rollout.transport.transports import Transport
from rollout.worker import RolloutWorker, choose_engine, make_engine
from tests.rollout.sending import delivered
from trainer.checkpoint import hf
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

pytestmark = pytest.mark.timeout(170)

SEQUENCES = probe_sequences(64, count=4, length=24, without=(0, 1))
SMALL_VLLM = {"max_context": 64, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}


def model(seed: int) -> V3Model:
    config = V3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1, max_position_embeddings=64, eos_token_id=1,
        initializer_range=0.1, num_nextn_predict_layers=1,
    )  # fmt: skip
    return V3Model(config).init_weights(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hf.save_folder(model(0), folder)
    return folder


@pytest.fixture(scope="module")
def actor_class(local_ray) -> type:
    return ray.remote(runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(RolloutWorker)


@pytest.fixture(scope="module")
def worker(actor_class, folder):
    actor = actor_class.remote("torch", str(folder), {"threads": 2, "max_context": 64})
    yield actor
    ray.kill(actor)


def requests(count: int = 4, **sampling) -> list[Request]:
    options = Sampling(**{"max_tokens": 12, "seed": 5, "ignore_eos": True, **sampling})
    return [Request(f"p{i}", 0, tuple(SEQUENCES[i][: 3 + i]), options) for i in range(count)]


def finish(worker) -> list:
    done = []
    while ended := ray.get(worker.completed.remote(30.0)):
        done += ended
    return sorted(done, key=lambda r: r.id)


def expected(folder: Path, weights: V3Model) -> list[np.ndarray]:
    """Log-probabilities of SEQUENCES under `weights`, from the engine in this process."""
    engine = TorchEngine(folder, max_context=64)
    engine.update(hf.named_checkpoint_tensors(weights), 1)
    return engine.score(SEQUENCES)


def gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_worker_writes_what_its_engine_writes(worker, folder):
    ray.get(worker.submit.remote(requests()))
    there = finish(worker)
    here = generate(TorchEngine(folder, max_context=64), requests())
    assert [r.tokens for r in there] == [r.tokens for r in here]
    np.testing.assert_allclose([r.logprobs for r in there], [r.logprobs for r in here], atol=1e-5)


def test_ping_tells_engine_and_threads(worker):
    answer = ray.get(worker.ping.remote())
    assert answer["kind"] == "torch" and answer["threads"] == 2 and answer["pid"] != os.getpid()


def update(actor, weights: V3Model, version: int, kind: str = "ipc") -> int:
    """What the worker answers to a sync."""
    sender = Transport(kind, (1,)).sender(0, torch.device("cpu"), "127.0.0.1")
    named = hf.named_checkpoint_tensors(weights)
    return delivered(sender, named, lambda update: ray.get(actor.update.remote(update)), version)


def apart(actor, logprobs: list[np.ndarray]) -> dict[str, float]:
    return logprob_diff(ray.get(actor.score.remote(SEQUENCES)), logprobs)


@pytest.mark.parametrize(("kind", "version"), [("ipc", 13), ("nccl", 14)])
def test_an_update_makes_the_engine_the_new_policy(worker, folder, kind, version):
    new = model(7)
    assert update(worker, new, version, kind) == version
    assert apart(worker, expected(folder, new))["max_abs"] < 1e-5
    assert apart(worker, expected(folder, model(0)))["mean_abs"] > 1e-2


def test_damaged_weights_poison_the_engine_until_whole_ones_arrive(worker, monkeypatch):
    honest = BucketViews.checksums

    def damaging(views, bucket, out=None):
        found = honest(views, bucket, out)
        views.buffer[100] ^= 1
        return found

    monkeypatch.setattr(BucketViews, "checksums", damaging)
    with pytest.raises(ray.exceptions.RayTaskError, match="arrived damaged"):
        update(worker, model(9), 30)
    monkeypatch.undo()
    with pytest.raises(ray.exceptions.RayTaskError, match="update to version 30 failed"):
        ray.get(worker.score.remote(SEQUENCES))
    assert update(worker, model(9), 31) == 31
    assert len(ray.get(worker.score.remote(SEQUENCES))) == len(SEQUENCES)


def test_interrupt_and_sleep_reach_the_engine(worker):
    many = [replace(r, sample=sample) for r in requests(max_tokens=40) for sample in range(500)]  # more than a moment's
    ray.get(worker.submit.remote(many))
    stopped = ray.get(worker.interrupt.remote())
    assert stopped and {r.finish_reason for r in stopped} == {"interrupted"}
    assert sorted(r.id for r in [*stopped, *finish(worker)]) == sorted(r.id for r in many)
    ray.get(worker.sleep.remote())
    with pytest.raises(ray.exceptions.RayTaskError, match="asleep"):
        ray.get(worker.score.remote(SEQUENCES))
    ray.get(worker.wake.remote())
    assert len(ray.get(worker.score.remote(SEQUENCES))) == len(SEQUENCES)


def test_vllm_worker_takes_weights_and_leaves_no_process(actor_class, folder):
    actor = actor_class.remote("vllm", str(folder), {"dtype": "float32", "threads": 1, **SMALL_VLLM})
    new = model(3)
    assert update(actor, new, 4, "nccl") == 4
    assert apart(actor, expected(folder, new))["max_abs"] < 1e-5
    ray.get(actor.submit.remote(requests()))
    rollouts = finish(actor)
    assert [r.versions for r in rollouts] == [[(4, 12)]] * 4
    scored = ray.get(actor.score.remote([[*r.prompt_tokens, *r.tokens] for r in rollouts]))
    written = [s[len(r.prompt_tokens) :] for r, s in zip(rollouts, scored, strict=True)]
    assert logprob_diff([np.array(r.logprobs) for r in rollouts], written, first=0)["max_abs"] < 1e-5

    process = psutil.Process(ray.get(actor.ping.remote())["pid"])
    assert process.children(recursive=True) == []
    ray.get(actor.close.remote())
    ray.kill(actor)
    assert gone(process.pid)


# ---- without an actor ----


def test_auto_takes_vllm_only_beside_a_cuda_device():
    assert choose_engine("auto", cuda_devices=0) == ("torch", "no CUDA device")
    kind, reason = choose_engine("auto", cuda_devices=2)
    assert kind == "vllm" and reason.startswith("2 CUDA device(s) and vLLM ")
    assert choose_engine()[0] == ("vllm" if torch.cuda.is_available() else "torch")


def test_named_engines_are_taken_and_unknown_ones_refused():
    assert choose_engine("torch") == ("torch", "asked for")
    assert choose_engine("vllm")[0] == "vllm"
    with pytest.raises(ValueError, match="'sglang' is unknown"):
        choose_engine("sglang")


def test_unknown_options_are_refused_with_the_known_ones(folder):
    with pytest.raises(ValueError, match="engine torch has no option max_contex; it has .*max_context"):
        make_engine("torch", folder, {"max_contex": 64})
    with pytest.raises(ValueError, match="engine 'auto' is unknown"):
        make_engine("auto", folder, {})
