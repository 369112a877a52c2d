"""What tests of several packages share: one Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from rlzero.cluster import ray_cluster as cluster

# Whether Ray asks for a token depends on what ran on this machine before; in this process it never does. Runs that the
# tests start as commands keep Ray's own choice.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


# Files that start runs, engines of vLLM, processes of several ranks, or that wait for deadlines; `make test-quick`
# leaves them out.
LONG = {
    "test_run_faults", "test_ranks", "test_cluster", "test_partial_rollouts", "test_turns", "test_sft", "test_cli",
    "test_loop", "test_drafts", "test_configured_algorithms", "test_engine_thread", "test_export_vllm", "test_ipc",
    "test_nccl", "test_serving", "test_speculation", "test_streaming", "test_parallel", "test_parallel_pipeline",
    "test_judge_served", "test_runner", "test_runner_ray", "test_sandbox_attacks", "test_sandbox_jobs",
    "test_math_adversarial", "test_bad_input", "test_noise", "test_triton_quantize", "test_model_triton",
    "test_step_triton", "test_table",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is long: files named in LONG, those of vLLM, and whatever uses Ray or a finished run."""
    for item in items:
        uses = {"local_ray", "finished"} & set(getattr(item, "fixturenames", ()))
        if uses or item.path.stem in LONG or item.path.stem.startswith("test_vllm"):
            item.add_marker("long")


@pytest.fixture(scope="session")
def end_of_ray() -> Iterator[None]:
    """Before pytest's last lines: what Ray still has to say would stand below them."""
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local_ray(end_of_ray) -> None:
    """A Ray of four CPUs, started the way a run starts it. It stays for later modules, because its start takes seconds.
    A test that wants another one ends it with ray.shutdown()."""
    cluster.connect(None, cpus=4)
