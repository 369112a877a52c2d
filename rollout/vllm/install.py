"""How an update gets into the models of one vLLM worker: in the engine's process, or one of several that share a model.

vLLM's own way, `reload_weights`, rebuilds layer after layer in their checkpoint form and repacks it: right wherever
vLLM repacks, and slow. On a GPU most layers keep the checkpoint's layout, so a copy of every tensor to where it belongs
is enough. Where that is, vLLM says itself: its `load_weights` runs once over tensors without memory, and the copies it
asks for are written down instead of made (rollout.vllm.copies). Whether a copy is all it takes is verified, not
assumed: after the first update, which is a reload, every shard of a tensor that this worker holds is read back from its
place and compared, by checksum, with what was sent (rollout.vllm.shards). Only then are updates copied; each is read
back again. Where a worker has to stay with the reload, its first update says why. What a kernel might keep elsewhere,
only log-probabilities see: `rollout.probe`.

Block-FP8 (E4M3 and one scale per 128x128) goes the same way. On Hopper the Triton experts and the CUTLASS linears
read the checkpoint's own layout, DeepGEMM's linears too where their scales stay float32 (VLLM_USE_DEEP_GEMM_E8M0=0;
with its default 1 vLLM quantizes anew to powers of two, and the engine no longer computes with what was sent).
Marlin, FlashInfer's and AITER's experts repack: they stay with `reload_weights`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rollout.transport.base import CorruptWeights, Received, Tensors, TensorSpec, WeightUpdate, at_hand
from rollout.transport.expected_weights import ExpectedWeights
from rollout.transport.transports import receive
from rollout.vllm.copies import (
    DERIVED,
    CannotPlan,
    Copy,
    Weights,
    checkpoint_form,
    copy_weights,
    plan_copies,
    unwritten,
)
from rollout.vllm.draft import draft_model, kept_for_draft, reload_draft
from rollout.vllm.serving import reset_expert_placement
from rollout.vllm.shards import UNREAD, Shards, same_shards

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Installed:
    """How an update came into an engine or one of its workers: by direct copies or vLLM's reload. `elements` are those
    of each tensor, `read` how many of them were read back from the engine's own memory and found to be what was sent
    (UNREAD: some that a worker holds were not). `reason` is why updates go on by the reload."""

    mode: Literal["direct", "reload"]
    elements: Int[np.ndarray, " tensors"]
    read: Int[np.ndarray, " tensors"]
    reason: str | None = None

    @property
    def tensors(self) -> int:
        return len(self.elements)

    @property
    def verified(self) -> int:
        """Tensors of which all workers together were found to hold every element."""
        return int((self.read >= self.elements).sum())

    @staticmethod
    def by_all(workers: Sequence[Installed]) -> Installed:
        """How the update came into the engine of these workers."""
        read = np.stack([worker.read for worker in workers])
        return Installed(
            "direct" if all(worker.mode == "direct" for worker in workers) else "reload",
            workers[0].elements,
            np.where((read == UNREAD).any(0), UNREAD, read.sum(0)),
            "; ".join(dict.fromkeys(worker.reason for worker in workers if worker.reason)) or None,
        )


@dataclass(frozen=True)
class Answer:
    """What became of an update in one worker. Workers answer errors, never raise them: vLLM reads no further than the
    first one, and would take what the others said for answers to its next question."""

    installed: Installed | None = None
    error: str | None = None
    corrupt: bool = False


def keep_installer(worker: Any, expected: ExpectedWeights) -> None:
    """Called once in every worker."""
    worker.rlzero_installer = Installer(worker, expected)


def install(worker: Any, source: WeightUpdate | Weights) -> Answer:
    """Called in every worker with the same update, or tensors at hand."""
    installer: Installer = worker.rlzero_installer
    try:
        update = isinstance(source, WeightUpdate)
        with closing(receive(source, installer.receivers) if update else at_hand(source)) as weights:
            weights.start()  # before anything else can fail: no other receiver waits for this one
            return Answer(installer.install(weights))
    except Exception as error:
        log.exception("the update failed in a worker")
        return Answer(error=f"{type(error).__name__}: {error}", corrupt=isinstance(error, CorruptWeights))


class Installer:
    """Brings updates into the models of one worker. `direct` None: updates are copied once one by reload has verified
    that copies are right; False: always the reload, for the `reason`."""

    def __init__(self, worker: Any, expected: ExpectedWeights):
        self.worker, self.expected = worker, expected
        self.receivers: dict[type, Any] = {}
        self.direct: bool | None = None
        self.reason: str | None = None
        self.shards: Shards | None = None
        runner = worker.model_runner
        if runner.device.type == "cpu":
            self.direct = False  # its kernels repack
        elif getattr(runner, "eplb_state", None) is not None:
            self._stay("load balancing moves experts between the GPUs, so that no place stays theirs")

    def install(self, weights: Received) -> Installed:
        """Installs a complete set. Raises CorruptWeights, naming the tensors, when the worker then holds something else
        than was sent, and ValueError for a set that is incomplete or does not fit."""
        specs = [spec for spec in weights.specs if spec.name in self.expected.shapes]
        elements = np.array([int(np.prod(spec.shape)) for spec in specs], np.int64)
        buckets = self.expected.checked_buckets(weights.buckets())
        if self.direct:
            self.direct = None  # an update that fails is followed by a reload, which verifies again
            read = self._copied(buckets, specs, weights)
            self.direct = True
            return Installed("direct", elements, read)
        plan = self._attempt(lambda: self._plan(specs)) if self.direct is None else None
        before = Shards(plan, specs) if plan is not None else None
        reload(self.worker, _passing(buckets, before))
        read = self._attempt(lambda: self._verified(before, specs, weights)) if before is not None else None
        return Installed("reload", elements, np.full(len(specs), UNREAD) if read is None else read, self.reason)

    def _copied(self, buckets: Iterator[Tensors], specs: Sequence[TensorSpec], weights: Received) -> np.ndarray:
        if self.shards.lines != [spec[:3] for spec in specs]:  # the plan is made by name and shape
            self.shards = Shards(self.shards.plan, specs)
        for bucket in _arriving(buckets, self.shards):
            copy_weights(self.shards.plan, bucket)
        runner = self.worker.model_runner
        for model in served_models(runner):
            refresh_derived(model, runner.model_config.dtype)
        read, wrong = self.shards.compared(weights.sent)
        if wrong:
            raise CorruptWeights(f"after the update the engine holds other weights than were sent: {few(wrong)}")
        return read

    def _plan(self, specs: Sequence[TensorSpec]) -> dict[str, list[Copy]]:
        runner = self.worker.model_runner
        plan: dict[str, list[Copy]] = {}
        for model in served_models(runner):
            for name, copies in planned(model, runner.model_config, self.expected.shapes, specs).items():
                plan.setdefault(name, []).extend(copies)
        return plan

    def _verified(self, before: Shards, specs: Sequence[TensorSpec], weights: Received) -> np.ndarray:
        """Called with the update in the models, brought there by vLLM. `before` has seen the tensors arrive."""
        runner = self.worker.model_runner
        plan = self._plan(specs)  # the reload may have put parameters elsewhere
        if not same_shards(before.plan, plan):
            raise CannotPlan("its loaders take other shards of the weights than before the reload")
        for model in served_models(runner):
            read_where_loaded(model, runner.model_config)
        shards = before.moved(plan, specs)
        read, wrong = shards.compared(weights.sent)
        if wrong:
            raise CannotPlan(
                f"this worker keeps shards of {len(wrong)} of {len(plan)} tensors in another form or dtype than they "
                f"were sent in ({few(wrong)})"
            )
        self.direct, self.shards = True, shards
        return read

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where it fails, and then updates stay with the reload, which does without."""
        try:
            return work()
        except CannotPlan as error:
            self._stay(str(error))
        except Exception as error:
            log.exception("direct updates could not be prepared")
            self._stay(f"{type(error).__name__}: {error}")
        return None

    def _stay(self, reason: str) -> None:
        self.direct, self.reason = False, reason
        log.warning("weights go through vLLM's reload_weights, which is slower: %s", reason)


def _arriving(buckets: Iterator[Tensors], shards: Shards) -> Iterator[Tensors]:
    shards.begin()
    for bucket in buckets:
        shards.arrived(bucket)
        yield bucket


def _passing(buckets: Iterator[Tensors], shards: Shards | None) -> Iterator[tuple[str, Tensor]]:
    for bucket in buckets if shards is None else _arriving(buckets, shards):
        yield from bucket


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- vLLM's reload, and what it derives from weights ----


def reload(worker: Any, weights: Weights) -> None:
    """vLLM's own layerwise reload."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    runner = worker.model_runner
    model, draft = runner.get_model(), draft_model(runner)
    if runner.device.type == "cpu":
        # The CPU kernel of the experts repacks their weights only while it is being built. A layer that keeps its
        # kernel takes the new weights unpacked and computes nonsense without an error.
        for module in (m for part in (model, draft) if part is not None for m in part.modules()):
            method = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
    derived = derived_weights(model) if runner.device.type == "cuda" else []
    try:
        # vLLM keeps tensors until their layer is complete; a transport may use their memory again before that.
        weights = ((name, tensor.clone()) for name, tensor in weights)
        kept: list[tuple[str, Tensor]] = []
        if draft is not None:
            weights = kept_for_draft(weights, runner.model_config.hf_config.num_hidden_layers, kept)
        runner.reload_weights(weights_iterator=weights)
        if draft is not None:
            reload_draft(runner, draft, kept)
        reset_expert_placement(runner)
    except BaseException:
        # Leaves the half-loaded state, in which the next reload would add to this one's counts.
        finalize_layerwise_reload(model, runner.model_config)
        raise
    put_back(derived)
    # vLLM takes a model for untied whose folder holds its head as well, and ties the two when they are equal.
    names = ("tie_word_embeddings", "word_embeddings_untied_by_checkpoint")
    config = runner.model_config
    if runner.device.type == "cpu" and any(getattr(c, n, False) for c in (config, config.hf_config) for n in names):
        # No tensor of its own arrives for a tied head, so vLLM leaves it with its repacked copy of the old embedding.
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


def derived_weights(model: torch.nn.Module) -> list[tuple[torch.nn.Module, dict[str, Tensor]]]:
    """MLA layers that hold something computed from their weights, and that. (In BF16 they hold views of the weight,
    which follow by themselves; of a quantized one, dequantized copies.)"""
    from vllm.model_executor.layers.attention import MLAAttention

    found = []
    for layer in model.modules():
        if not isinstance(layer, MLAAttention):
            continue
        source = layer.kv_b_proj.weight.untyped_storage().data_ptr()
        held = {name: getattr(layer, name, None) for name in DERIVED}
        if any(tensor is None for tensor in held.values()):
            raise CannotPlan(f"this vLLM's MLA layer has no {' or '.join(DERIVED)}: it derives other weights")
        if any(tensor.untyped_storage().data_ptr() != source for tensor in held.values()):
            found.append((layer, held))
    return found


@torch.no_grad()
def put_back(derived: list[tuple[torch.nn.Module, dict[str, Tensor]]]) -> None:
    """Brings what layers have derived since to where it was before: captured graphs read there."""
    for layer, held in derived:
        for name, tensor in held.items():
            if (new := getattr(layer, name)) is not tensor:
                tensor.copy_(new)
                setattr(layer, name, tensor)


@torch.no_grad()
def refresh_derived(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Computes anew what MLA layers derived from their weights. Returns how many layers needed it."""
    derived = derived_weights(model)
    for layer, _ in derived:
        layer.process_weights_after_loading(dtype)
    put_back(derived)
    return len(derived)


# Where quantized experts' kernels keep their scales, and the layer's parameter that they are.
_EXPERT_SCALES = {"_w1": "w13_weight_scale_inv", "_w2": "w2_weight_scale_inv"}


def expert_scales(model: torch.nn.Module) -> Iterator[tuple[Any, torch.nn.Parameter]]:
    """What describes a quantized matrix of experts to its kernel, scales included, and the layer's own scales."""
    for layer in model.modules():
        described = getattr(getattr(layer, "quant_method", None), "moe_quant_config", None)
        for part, name in _EXPERT_SCALES.items():
            parameter = layer._parameters.get(name)
            if described is not None and parameter is not None:
                yield getattr(described, part), parameter


def bind_scales(model: torch.nn.Module) -> None:
    """Lets the experts' kernels read the layers' own scales. vLLM's reload puts new weights where the old ones were,
    but leaves the kernels with scales of their own: no update but the next reload would reach them."""
    for described, parameter in expert_scales(model):
        scale = described.scale
        if not isinstance(scale, Tensor) or (scale.shape, scale.dtype) != (parameter.shape, parameter.dtype):
            raise CannotPlan("the kernels of its experts keep scales in a form of their own")
        described.scale = parameter


def served_models(runner: Any) -> list[torch.nn.Module]:
    """What the worker serves, and what drafts for it."""
    return [model for model in (runner.get_model(), draft_model(runner)) if model is not None]


def planned(
    model: torch.nn.Module, config: Any, shapes: Mapping[str, tuple[int, ...]], specs: Sequence[TensorSpec]
) -> dict[str, list[Copy]]:
    """The copies that the model's loaders make of the tensors of an update. Raises CannotPlan."""
    if config.quantization is None:
        return plan_copies(model.load_weights, shapes)
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in specs}
    with checkpoint_form(model):
        plan = plan_copies(model.load_weights, shapes, dtypes)
    if left := unwritten(plan, model):
        raise CannotPlan(f"its loaders write nothing to {few(left)}")
    return plan


def read_where_loaded(model: torch.nn.Module, config: Any) -> None:
    """Lets everything in a model that was just loaded read what its loaders write, or follow it."""
    if config.quantization is not None:
        bind_scales(model)
    refresh_derived(model, config.dtype)
