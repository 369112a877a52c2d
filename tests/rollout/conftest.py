"""What the tests of the real vLLM share: the process in which it is imported."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.managers import BaseManager

import pytest

from .vllm_process import EngineProcess, started


@pytest.fixture(scope="session")
def vllm_process() -> Iterator[BaseManager]:
    process = started(EngineProcess)
    yield process
    process.shutdown()
