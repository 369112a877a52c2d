"""How long processes were ready to run but waited for a core: time that no deadline may count against an answer."""

from __future__ import annotations

from pathlib import Path


def waited_s(pid: int) -> float:
    """The longest time that one of the leaves of the process tree below `pid` (a sandbox's jobs) has waited for a core
    since it began; 0 where there is none, or the kernel does not count."""
    return max((_waited_s(leaf) for leaf in _leaves(pid)), default=0.0)


def _waited_s(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _leaves(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [leaf for child in children for leaf in _leaves(int(child)) or [int(child)]]
