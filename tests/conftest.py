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
