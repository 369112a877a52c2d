"""A trainer and an engine on different hosts: they meet at the store that the trainer hosts at its node's address."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rollout.transport.checksum import checksum
from tests.rollout.two_hosts import HOSTS, End, refusal, two_hosts, weights

WHY = refusal()
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(WHY is not None, reason=f"takes network namespaces, so root and iproute2: {WHY}"),
]


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[End, End]]:
    with two_hosts() as (here, there):
        trainer, engine = End(here, "send"), End(there, "receive")
        yield trainer, engine
        trainer.close()
        engine.close()


def test_weights_reach_an_engine_on_another_host_sync_after_sync(ends):
    trainer, engine = ends
    for version in (1, 2):
        trainer.tell(host=HOSTS[0], version=version, send=True)
        engine.tell(update=trainer.hear()["update"])
        sent = {name: checksum(tensor) for name, tensor in weights(version).items()}
        assert engine.hear() == {"checksums": sent}


def test_an_address_that_means_another_host_over_there_is_an_error_that_names_it(ends):
    trainer, engine = ends
    trainer.tell(host="127.0.0.1", version=3, send=False)
    engine.tell(update=trainer.hear()["update"])
    assert "nobody is met at the store 127.0.0.1:" in engine.hear()["error"]
