"""Run by test_vllm_fp8.py in a process of its own: vLLM's own FP8 model, its loaders, its reload and its MLA layers on
a CPU, with the layout that its Triton kernels want. The kernels are never called: they need a GPU, and what is checked
here is where weights go. Prints what was found as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from rollout.vllm.engine import ENVIRONMENT

os.environ |= ENVIRONMENT

import torch

from rollout.transport.expected_weights import ExpectedWeights
from rollout.transport.ipc import IpcReceiver, IpcSender
from rollout.vllm.install import Installer, derived_weights, expert_scales
from tests.rollout.sending import sending
from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
from trainer.model.v3 import V3Model
from trainer.model.v3_config import FP8_BLOCKS, V3Config
from trainer.precision.quantize import quantize_blocks

CONFIG = V3Config(
    vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, qk_nope_head_dim=128, v_head_dim=128,
    q_lora_rank=128, kv_lora_rank=512, qk_rope_head_dim=64, first_k_dense_replace=1, n_group=2, topk_group=1,
    eos_token_id=1, max_position_embeddings=512, initializer_range=0.04,
)  # fmt: skip


def choose_triton() -> None:
    """The kernels of a Hopper GPU without DeepGEMM, whose weights lie as the checkpoint's; and nothing repacked for a
    CPU."""
    import vllm.model_executor.kernels.linear as kernels
    import vllm.model_executor.layers.quantization.fp8 as fp8
    from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.platforms import PlatformEnum

    for name in ("is_supported", "can_implement"):
        setattr(TritonFp8BlockScaledMMKernel, name, classmethod(lambda cls, *_: (True, None)))
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [TritonFp8BlockScaledMMKernel]
    fp8.select_fp8_moe_backend = lambda *_, **__: (Fp8MoeBackend.TRITON, TritonExperts)
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        method.process_weights_after_loading = lambda self, layer: None


class Runner:
    """What an Installer needs of vLLM's model runner."""

    device = torch.device("cuda")  # as far as the Installer is concerned

    def __init__(self, model: torch.nn.Module, model_config):
        self.model, self.model_config = model, model_config
        self.vllm_config = SimpleNamespace(speculative_config=None)

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self, weights_iterator) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        self.model.load_weights(weights_iterator)
        finalize_layerwise_reload(self.model, self.model_config)


@contextmanager
def started(folder: Path) -> Iterator[Runner]:
    """A model that was given no weights yet."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    choose_triton()
    config = EngineArgs(
        model=str(folder), dtype="bfloat16", max_model_len=64, skip_tokenizer_init=True, enforce_eager=True,
        quantization="fp8", hf_overrides={"quantization_config": FP8_BLOCKS}, kv_cache_memory_bytes=1 << 24,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(config)
        for parameter in model.parameters():
            parameter.data.copy_((torch.rand(parameter.shape) * 1e-3).to(parameter.dtype))
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        yield Runner(model, config.model_config)


def main(folder: Path) -> dict:
    policy = V3Model(CONFIG).init_weights(0).to(torch.bfloat16)
    save_folder(policy, folder)
    with started(folder) as runner:
        return updated(policy, folder, runner)


@torch.no_grad()
def updated(policy: V3Model, folder: Path, runner: Runner) -> dict:
    """What three updates, each of new weights, left in the model."""
    expected = ExpectedWeights(folder, "fp8")
    installer = Installer(type("Worker", (), {"model_runner": runner})(), expected)
    sender = IpcSender(torch.device("cpu"), payload="fp8", bucket_bytes=1 << 20)
    held = [tensor for _, tensors in derived_weights(runner.model) for tensor in tensors.values()]
    found: dict = {"updates": [], "reasons": [], "apart": [], "wrong": None, "derived": len(held)}
    named = dict(named_checkpoint_tensors(policy))
    for version in (1, 2, 3):
        for tensor in named.values():
            tensor += (0.02 * torch.randn(tensor.shape)).to(tensor.dtype)
        with sending(sender, named.items(), version) as (update, _):
            arrived = IpcReceiver().receive(update)
            installed = installer.install(arrived)
        found["updates"].append([installed.mode, installed.tensors, installed.verified])
        found["reasons"].append(installed.reason)
        for i, (_, derived) in enumerate(derived_weights(runner.model)):
            w = quantize_blocks(named[f"model.layers.{i}.self_attn.kv_b_proj.weight"]).dequantize().view(2, 256, 512)
            keys, values = derived["W_UK_T"].float(), derived["W_UV"].float().transpose(1, 2)
            apart = torch.cat([keys - w[:, :128], values - w[:, 128:]]).abs().max()
            found["apart"].append(float(apart / w.abs().max()))
    now = [tensor for _, tensors in derived_weights(runner.model) for tensor in tensors.values()]
    found["moved"] = sum(a.data_ptr() != b.data_ptr() for a, b in zip(held, now, strict=True))
    scales = [(described.scale, parameter) for described, parameter in expert_scales(runner.model)]
    found["kernels' scales"] = [kernel.data_ptr() == parameter.data_ptr() for kernel, parameter in scales]
    # One scale is damaged where the engine keeps it.
    (copy,) = installer.shards.plan["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    copy.target.mul_(2.0)
    found["wrong"] = installer.shards.compared(arrived.sent)[1]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
