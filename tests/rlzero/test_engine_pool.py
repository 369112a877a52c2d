"""Several rollout workers as one engine: who writes what. Real Ray actors, real torch engines."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rlzero.cluster.engines import EnginePool, capacity
from rlzero.cluster.ray_cluster import Cluster
from rlzero.config.rl import Config
from rollout.engine import Request, Rollout, Sampling

from .recorded_run import SlowCluster

pytestmark = pytest.mark.timeout(300)

SLOW_STEP_S = 0.1  # what a step of the slow worker takes longer than its computation


class UnevenCluster(SlowCluster):
    """Worker 1 is slow."""

    def step_s(self, index: int) -> float:
        return SLOW_STEP_S if index == 1 else 0.0


def with_pool(path: Path, work: Callable[[EnginePool], Awaitable[Any]], cluster: type = Cluster, **options: Any) -> Any:
    """What `work(pool)` returns, with the engines that the config at `path` asks for."""
    config = Config.load(path)

    async def go() -> Any:
        with cluster(config) as started:
            pool = EnginePool(started, "torch", str(config.policy.path), {"dtype": "float32", **options})
            await pool.ready()
            return await work(pool)

    return asyncio.run(go())


def groups(count: int, size: int = 2, tokens: int = 12) -> list[list[Request]]:
    """Prompts that differ, of unequal lengths."""
    sampling = Sampling(tokens, seed=3, ignore_eos=True)
    return [
        [Request(f"g{g}", s, tuple(range(5 + g, 15 + g + g % 3)), sampling) for s in range(size)] for g in range(count)
    ]


async def drain(pool: EnginePool) -> dict[str, Rollout]:
    """Every rollout that comes, by id; none comes twice."""
    found: dict[str, Rollout] = {}
    while pool.busy:
        for rollout in await pool.completed():
            assert rollout.id not in found
            found[rollout.id] = rollout
    return found


@pytest.fixture
def two_workers(local_ray, write_config, tmp_path) -> Path:
    return write_config(tmp_path, **{"rollout.workers": 2})


def test_groups_go_to_the_worker_that_has_room(two_workers):
    """The fast one writes more, and all is done well before equal shares would be."""

    async def work(pool: EnginePool) -> tuple[list[int], list[dict[str, Rollout]], list[float]]:
        await pool.submit(groups(2))  # warm
        await drain(pool)
        pool.shares()
        began_s = time.monotonic()
        await pool.submit(groups(16))
        assert all(len(requests) <= capacity(4) for requests in pool.open)
        found = await drain(pool)
        took_s, tokens = time.monotonic() - began_s, list(pool.tokens)

        pool._capacity = [1000, 1000]  # everything at once: equal shares, in turn
        began_s = time.monotonic()
        await pool.submit(groups(16))
        assert [len(requests) for requests in pool.open] == [16, 16]
        return tokens, [found, await drain(pool)], [took_s, time.monotonic() - began_s]

    options = {"max_batch": 4, "cache": "expanded"}  # which takes the native kernels
    tokens, (found, even), (took_s, even_s) = with_pool(two_workers, work, UnevenCluster, **options)
    assert found.keys() == even.keys() == {r.id for group in groups(16) for r in group}
    assert sum(tokens) == 32 * 12 and tokens[0] > 2 * tokens[1] > 0
    assert took_s < 0.6 * even_s
    # Which worker wrote a group, and beside which others, changes no bit where kernels are the native ones.
    for name, rollout in found.items():
        assert (rollout.tokens, rollout.logprobs) == (even[name].tokens, even[name].logprobs)


def test_the_samples_of_a_group_stay_on_one_worker(two_workers):
    async def work(pool: EnginePool) -> None:
        await pool.submit(groups(11, size=3))
        while pool.busy:
            owners = [{name.split("/")[0] for name in requests} for requests in pool.open]
            assert not owners[0] & owners[1]
            await pool.completed()

    with_pool(two_workers, work, max_batch=4)


def test_interruption_takes_back_what_runs_and_what_waits_and_nothing_else(two_workers):
    async def work(pool: EnginePool) -> tuple[list[Rollout], dict[str, Rollout]]:
        asked = groups(12, tokens=40)
        await pool.submit(asked)
        ids = {r.id for group in asked[:10] for r in group}
        await asyncio.sleep(5 * SLOW_STEP_S)
        stopped = await pool.interrupt(ids)
        return stopped, await drain(pool)

    stopped, rest = with_pool(two_workers, work, UnevenCluster, max_batch=4)
    names = {r.id for r in stopped}
    assert all(r.finish_reason == "interrupted" for r in stopped) and any(0 < len(r.tokens) < 40 for r in stopped)
    assert {"g10/0", "g10/1", "g11/0", "g11/1"} <= rest.keys() and not rest.keys() & names
    assert all(len(r.tokens) == 40 for r in rest.values())


def test_a_worker_found_dead_by_two_calls_is_replaced_once_and_loses_nothing(two_workers):
    async def work(pool: EnginePool) -> tuple[int, dict[str, Rollout]]:
        victim = (await pool.workers[1].call("ping", deadline_s=30))["pid"]
        await pool.submit(groups(12, tokens=40))
        reading = asyncio.create_task(drain(pool))  # finds it dead in `completed`
        await asyncio.sleep(2 * SLOW_STEP_S)
        os.kill(victim, signal.SIGKILL)
        scores = await asyncio.gather(*(pool.score([[5, 6, 7]], 1.0) for _ in range(2)))
        assert all(len(score) == 2 and score[0] is not None for score in scores)  # a dead one has none
        await asyncio.gather(pool.restart(), pool.restart())
        return pool.restarts, await reading

    restarts, found = with_pool(two_workers, work, UnevenCluster, max_batch=4)
    assert restarts == 1
    assert found.keys() == {r.id for group in groups(12) for r in group}
    assert all(len(r.tokens) == 40 for r in found.values())
