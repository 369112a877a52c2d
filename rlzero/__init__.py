"""Turns a base model into a reasoner with reinforcement learning, the R1-Zero way. From Python: docs/python.md.

Importing it makes `rewards`, `rollout` and `trainer` the project's own packages, whatever else has these names.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

__all__ = ["evaluate", "score", "train"]

_HERE = os.path.dirname(os.path.abspath(__file__))
# A wheel keeps the other packages in here, where no package of another project can have the same path (setup.py).
_INSTALLED = os.path.join(_HERE, "_packages")
HOME = _INSTALLED if os.path.isdir(_INSTALLED) else os.path.dirname(_HERE)
PACKAGES = ("rewards", "rollout", "trainer")


class _OwnPackages:
    """Finds the project's packages where they are, whatever else has their names: a file `trainer.py` in the folder
    that a command is started in, a package `rewards` of another project."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [HOME]) if name in PACKAGES else None


for _name in PACKAGES:
    _file = getattr(sys.modules.get(_name), "__file__", None)
    if _file is not None and not os.path.abspath(_file).startswith(HOME + os.sep):
        raise ImportError(f"{_file} was imported as {_name!r}, which is a package of rlzero: import rlzero before it")
sys.meta_path.insert(0, _OwnPackages)
# `python -m rlzero.cli` puts the working folder before everything: a file random.py there would be taken for Python's.
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()] and sys.path[0] != os.path.dirname(_HERE):
    del sys.path[0]


def __getattr__(name: str) -> Any:
    """The stable surface, imported when it is first asked for: `import rlzero` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'rlzero' has no attribute {name!r}")
    from rlzero import api

    return getattr(api, name)
