"""Head and optimizer kernels, interpreted on the CPU: triton_step_checks.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("triton_step_checks.py")


def test_interpreted_kernels_compute_what_float64_does():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(CHECKS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, cwd=CHECKS.parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
