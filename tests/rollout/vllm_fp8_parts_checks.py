"""Run by test_vllm_fp8_parts.py in a process of its own: the installer of workers that hold parts, with vLLM's own FP8
model, loaders and reload (vllm_fp8_checks.py). Prints what was found as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rollout.transport.expected_weights import ExpectedWeights
from rollout.transport.ipc import IpcTransport
from rollout.vllm.install import expert_scales
from rollout.vllm.parts import PartsInstaller
from rollout.vllm.relay import verified_by_all
from tests.rollout.vllm_fp8_checks import CONFIG, Runner, started
from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
from trainer.model.v3 import V3Model


@torch.no_grad()
def updated(policy: V3Model, folder: Path, runner: Runner) -> dict:
    """How three updates, each of new weights, came in."""
    expected = ExpectedWeights(folder, "fp8")
    installer = PartsInstaller(type("Worker", (), {"model_runner": runner})(), expected.shapes)
    here, there = IpcTransport(1 << 20, payload="fp8"), IpcTransport()
    named = dict(named_checkpoint_tensors(policy))
    found: dict = {"ways": [], "verified": [], "reasons": []}
    for version in (1, 2, 3):
        for tensor in named.values():
            tensor += (0.02 * torch.randn(tensor.shape)).to(tensor.dtype)
        handle = here.publish(named.items(), version)
        entries = handle.manifest.entries
        installed = installer.install(there.receive_buckets(handle), entries)
        layout = [(entry.name, entry.shape, getattr(torch, entry.dtype)) for entry in entries]
        found["ways"].append(installed.way)
        found["verified"].append([verified_by_all([installed.read], layout), len(layout)])
        found["reasons"].append(installed.reason)
    scales = [(described.scale, parameter) for described, parameter in expert_scales(runner.model)]
    found["kernels' scales"] = [kernel.data_ptr() == parameter.data_ptr() for kernel, parameter in scales]
    (copy,) = installer.parts.plan["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    copy.target.mul_(2.0)
    found["wrong"] = installer.parts.compared()[1]
    return found


def main(folder: Path) -> dict:
    policy = V3Model(CONFIG).init_weights(0).to(torch.bfloat16)
    save_folder(policy, folder)
    with started(folder) as runner:
        return updated(policy, folder, runner)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
