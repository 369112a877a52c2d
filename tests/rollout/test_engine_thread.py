"""An engine on a thread of its own: it writes unasked, and other calls come in between two of its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.engine import EngineUnusable, Request, Rollout, Sampling, generate
from rollout.engine_thread import EngineThread
from rollout.torch.engine import TorchEngine
from rollout.worker import make_engine
from trainer.checkpoint import hf
from trainer.checkpoint.folder import FolderReader
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

pytestmark = pytest.mark.timeout(120)

STEP_S = 0.01  # what a step of the slowed engine takes at least


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = V3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1, max_position_embeddings=512, eos_token_id=1,
        initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    hf.save_folder(V3Model(config).init_weights(0), path)
    return path


@pytest.fixture
def thread(folder) -> Iterator[EngineThread]:
    """Around the real engine, whose steps take a while."""

    def make() -> TorchEngine:
        engine = TorchEngine(folder)
        step = engine._step
        engine._step = lambda: (time.sleep(STEP_S), step())
        return engine

    thread = EngineThread(make)
    yield thread
    thread.close().result(10)


def requests(count: int = 3, tokens: int = 200) -> list[Request]:
    return [Request(f"p{i}", 0, (5 + i, 9, 13), Sampling(tokens, ignore_eos=True)) for i in range(count)]


def finish(thread: EngineThread) -> list[Rollout]:
    done = []
    while ended := thread.completed():
        done += ended
    return sorted(done, key=lambda rollout: rollout.id)


def test_it_writes_what_the_engine_writes(thread, folder):
    thread.submit(requests(tokens=20)).result(10)
    assert finish(thread) == generate(TorchEngine(folder), requests(tokens=20))


def test_it_writes_while_nobody_waits(thread):
    thread.submit(requests(tokens=10)).result(10)
    until_s = time.monotonic() + 30
    while thread._open and time.monotonic() < until_s:
        time.sleep(0.01)
    began_s = time.monotonic()
    assert len(thread.completed()) == 3 and time.monotonic() - began_s < 1


def test_it_starts_in_the_thread_it_works_in():
    seen = []

    def make() -> None:
        seen.append(threading.current_thread().name)
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        EngineThread(make)
    assert seen == ["engine"]


def test_an_update_passes_a_completed_that_waits(thread, folder):
    """It comes after the step in flight, although nothing ends for seconds."""
    thread.submit(requests()).result(10)
    found: list[Rollout] = []
    waiting = threading.Thread(target=lambda: found.extend(thread.completed(60.0)))
    waiting.start()
    time.sleep(20 * STEP_S)
    began_s = time.monotonic()
    thread.call(lambda engine: None).result(10)
    wait_s = time.monotonic() - began_s
    thread.call(lambda engine: engine.update(FolderReader(folder), 3)).result(10)
    assert waiting.is_alive() and wait_s < 0.5
    waiting.join(60)
    found += finish(thread)
    assert [[version for version, _ in r.versions] for r in found] == [[0, 3]] * 3
    assert all(sum(n for _, n in r.versions) == 200 for r in found)


def test_interrupted_requests_come_back_and_the_others_go_on(thread):
    thread.submit(requests()).result(10)
    time.sleep(10 * STEP_S)
    (stopped,) = thread.interrupt({"p1/0"}).result(10)
    assert stopped.finish_reason == "interrupted" and 0 < len(stopped.tokens) < 200
    assert [r.id for r in finish(thread)] == ["p0/0", "p2/0"]


def test_completed_returns_at_once_where_nothing_is_open(thread):
    assert thread.completed() == []
    thread.submit(requests()).result(10)
    thread.interrupt().result(10)
    assert thread.completed() == []


def test_an_engine_that_cannot_write_says_so_until_a_call_helped(thread):
    thread.submit(requests(tokens=30)).result(10)
    thread.call(lambda engine: engine.sleep()).result(10)
    for _ in range(2):
        with pytest.raises(EngineUnusable, match="asleep"):
            thread.completed(10)
    thread.call(lambda engine: engine.wake()).result(10)
    assert [len(r.tokens) for r in finish(thread)] == [30] * 3


def test_what_a_call_raises_reaches_its_caller_and_nobody_else(thread):
    thread.submit(requests(tokens=30)).result(10)
    with pytest.raises(ValueError, match="empty prompt"):
        thread.submit([Request("bad", 0, (), Sampling(3))]).result(10)
    assert len(finish(thread)) == 3


def test_after_closing_every_call_is_refused(folder):
    thread = EngineThread(lambda: TorchEngine(folder))
    thread.close().result(10)
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(requests()).result(10)
    assert thread.completed() == []


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_a_call_to_vllm_waits_for_one_step(tmp_path):
    """While vLLM writes and nothing ends: a call comes in within 50 ms, and an update meets every running request.
    vLLM changes its process, so this test stays the last one here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = V3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=8, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, first_k_dense_replace=1, max_position_embeddings=2048, eos_token_id=1,
        initializer_range=0.05,
    )  # fmt: skip
    models = [V3Model(config).init_weights(seed).to(dtype) for seed in (0, 1)]
    hf.save_folder(models[0], tmp_path)
    options = {"dtype": str(dtype).removeprefix("torch."), "enforce_eager": device == "cpu"}
    options |= {"gpu_memory_utilization": 0.2} if device == "cuda" else {"kv_cache_memory_bytes": 64 << 20}
    tokens = 1500 if device == "cuda" else 300
    thread = EngineThread(lambda: make_engine("vllm", tmp_path, options))
    thread.submit(requests(16, tokens)).result(60)
    time.sleep(0.5)
    waits = []
    for _ in range(20):
        began_s = time.monotonic()
        thread.call(lambda engine: None).result(10)
        waits.append(time.monotonic() - began_s)
        time.sleep(0.01)
    began_s = time.monotonic()
    thread.call(lambda engine: engine.update(list(hf.named_checkpoint_tensors(models[1])), 1)).result(60)
    update_s = time.monotonic() - began_s
    found = finish(thread)
    thread.close().result(60)
    median_ms, most_ms = 1e3 * np.median(waits), 1e3 * max(waits)
    print(f"{device}: a call waits {median_ms:.1f} ms (median), {most_ms:.1f} ms (most)")
    print(f"an update in flight takes {1e3 * update_s:.1f} ms, waiting included")
    assert np.median(waits) < 0.05
    assert [[version for version, _ in r.versions] for r in found] == [[0, 1]] * 16
