"""What pyproject.toml cannot say: where a wheel keeps the packages whose names other projects use as well.

`rewards`, `rollout` and `trainer` go into rlzero/_packages, and rlzero/__init__.py finds them there; a .pth file
appends that folder to the path, so that `from rewards import math_reward` works where no other project has the name.
An editable installation leaves the repository as it is.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

OWN, INSIDE = ("rewards", "rollout", "trainer"), "rlzero._packages"


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "rlzero.pth").write_text(INSIDE.replace(".", "/") + "\n")


found = find_packages(include=["rlzero*", *(f"{name}*" for name in OWN)])
if "editable_wheel" in sys.argv:
    setup(packages=found)
else:
    setup(
        packages=[p if p.startswith("rlzero") else f"{INSIDE}.{p}" for p in found],
        package_dir={f"{INSIDE}.{name}": name for name in OWN},
        cmdclass={"build_py": BuildPy},
    )
