"""Compiles the C++ beside this file for this machine's processor, once, and calls it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = ("v3.cpp", "kernels.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class CompilerMissing(RuntimeError):
    """There is no C++ compiler, or it refused."""


class Model(ctypes.Structure):
    """`Model` of v3.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "hidden", "layers", "heads", "nope", "rope", "value", "q_lora", "kv_lora", "vocab",
            "experts", "top_k", "groups", "top_groups", "normalise", "fold",
        )),
        *((name, ctypes.c_float) for name in ("softmax_scale", "eps", "latent_eps", "routed_scale")),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "cos", "sin")),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """`Layer` of v3.cpp."""

    _fields_ = [
        ("moe", ctypes.c_int32),
        ("dense_width", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (
            "first", "q_up", "kv_up", "root", "out", "gate_up", "down", "router", "bias", "expert_gate_up",
            "expert_down",
        )),
        ("expert_width", ctypes.c_int32),
    ]  # fmt: skip


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def build() -> Path:
    """The compiled library, made now if this source has not been compiled for this processor yet. It lies in
    `$XDG_CACHE_HOME/rlzero` (default `~/.cache/rlzero`). Raises CompilerMissing."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CompilerMissing(
            "the torch engine's CPU kernels need a C++ compiler (c++, g++ or clang++ on the PATH, or CXX): install "
            "one, or choose kernels='torch'"
        )
    here = Path(__file__).parent
    key = hashlib.sha256("\0".join([compiler, *FLAGS, _processor()]).encode())
    for source in SOURCES:
        key.update((here / source).read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlzero"
    target = folder / f"v3-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed when done: processes may build side by side
        made = Path(temporary) / target.name
        command = [compiler, *FLAGS, str(here / SOURCES[0]), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CompilerMissing(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        made.rename(target)
    return target


@cache
def load() -> ctypes.CDLL:
    """The library, ready to call. torch has to be imported first: both then share one OpenMP runtime."""
    import torch  # noqa: F401

    library = ctypes.CDLL(str(build()))
    library.vector_lanes.restype = ctypes.c_int32
    library.v3_forward.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int32] * 2 + [ctypes.c_void_p]
    library.v3_forward.restype = None
    library.draw.argtypes = [ctypes.c_int32] * 2 + [ctypes.c_void_p] * 5
    library.draw.restype = None
    return library


if __name__ == "__main__":  # set-up compiles ahead of the first run
    print(build())
