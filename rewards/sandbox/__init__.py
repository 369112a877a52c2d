"""Runs model-written Python in isolation: namespaces, an empty root, landlock, seccomp, rlimits; one fork a job.

`Sandbox` is the front door (`sandbox.py`); `isolation.py` builds the layers, `fork_server.py` forks, `job.py` and
`tester.py` run inside, `values.py` is the only language they speak with the trusted side (`exchange.py`).
"""

from .exchange import SandboxError
from .isolation import Limits
from .sandbox import Run, Sandbox

__all__ = ["Limits", "Run", "Sandbox", "SandboxError"]
