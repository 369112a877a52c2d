"""Two hosts on one machine: network namespaces that see each other over a pair of virtual interfaces and share nothing
else of the network. Run as a program it is one end of a weight sync (test_two_hosts.py); it speaks lines of JSON."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOSTS = ("10.231.77.1", "10.231.77.2")


def refusal() -> str | None:
    """Why there can be no namespaces here."""
    try:
        with two_hosts():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return str(getattr(error, "stderr", error)).strip() or str(error)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with the addresses of HOSTS."""
    names = [f"rlzero-{os.getpid()}-{end}" for end in "ab"]
    links = [f"rlz{os.getpid() % 10**7}{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for name, link, address in zip(names, links, HOSTS, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in (link, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class End:
    """A process of this program on one of the hosts."""

    def __init__(self, namespace: str, role: str):
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.rollout.two_hosts", role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def tell(self, **message: object) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict:
        return json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def weights(seed: int) -> dict:
    import torch

    torch.manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(64 + i, 24) for i in range(12)}


def main(role: str) -> None:
    import torch

    from rollout.transport.base import CorruptWeights, layout_of
    from rollout.transport.checksum import checksum
    from rollout.transport.nccl import NcclReceiver, NcclSender

    sender, receiver = None, NcclReceiver(timeout_s=20.0)
    for line in sys.stdin:
        message, answer = json.loads(line), {}
        if role == "send":
            if sender is None or sender.host != message["host"]:
                sender = NcclSender(torch.device("cpu"), host=message["host"], bucket_bytes=16 << 10, timeout_s=20.0)
            named = weights(message["version"])
            update = sender.prepare(layout_of(named.items()), message["version"])
            print(json.dumps({"update": base64.b64encode(pickle.dumps(update)).decode()}), flush=True)
            if message["send"]:
                sender.send(named.items())
        else:
            update = pickle.loads(base64.b64decode(message["update"]))
            try:
                answer = {"checksums": {name: checksum(tensor) for name, tensor in receiver.receive(update)}}
            except CorruptWeights as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
