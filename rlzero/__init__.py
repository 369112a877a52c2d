"""Turns a base model into a reasoner with reinforcement learning, the R1-Zero way. From Python: docs/python.md."""

from typing import Any

__all__ = ["evaluate", "score", "train"]


def __getattr__(name: str) -> Any:
    """The stable surface, imported when it is first asked for: `import rlzero` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'rlzero' has no attribute {name!r}")
    from rlzero import api

    return getattr(api, name)
