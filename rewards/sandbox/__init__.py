"""Runs model-written Python behind walls: namespaces, an empty root, landlock, seccomp, rlimits; one fork a job.

`Sandbox` is the front door (`sandbox.py`); `walls.py` builds the walls, `zygote.py` forks, `job.py` and `tester.py` run
inside, `values.py` is the only language they speak with the trusted side (`exchange.py`).
"""

from .exchange import SandboxError
from .sandbox import Run, Sandbox
from .walls import Limits

__all__ = ["Limits", "Run", "Sandbox", "SandboxError"]
