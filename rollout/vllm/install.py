"""How new weights get into a running vLLM model. Of several workers that share one: rollout.vllm.parts.

vLLM's own way, `reload_weights`, rebuilds layer after layer in their checkpoint form and repacks it: right wherever
vLLM repacks, and slow. On a GPU most layers keep the checkpoint's layout, so a copy of every tensor to where it belongs
is enough. Where that is, vLLM says itself: its `load_weights` runs once over tensors without memory, and the copies it
asks for are written down instead of made. Whether a copy is all it takes is shown, not assumed: after the first
update, which goes vLLM's way, every tensor is read back from its place and compared, by fingerprint, with what was
published. Only then do updates go directly; each is read back again. What a kernel might keep elsewhere, only
log-probabilities see: `rollout.probe`.

Block-FP8 (E4M3 and one scale per 128x128) goes the same ways. On Hopper the Triton experts and the CUTLASS linears
read the checkpoint's own layout, DeepGEMM's linears too where their scales stay float32 (VLLM_USE_DEEP_GEMM_E8M0=0;
with its default 1 vLLM quantizes anew to powers of two, and the engine no longer computes with what was published).
Marlin, FlashInfer's and AITER's experts repack: they stay with `reload_weights`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout.transport.base import CorruptWeights, Entry, Manifest
from rollout.transport.fingerprint import Reading, fingerprints
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Installed:
    """How an update came in: `way` is "direct" or "reload"; `verified` of `tensors` were read back from the engine's
    own memory and found to be what was published (with several workers: every part of them that one of these holds)."""

    way: str
    tensors: int
    verified: int


class ReadBack:
    """The engine's own tensors in the checkpoint's form and dtype. Left out are those that it does not hold as a whole.
    A dtype that holds more than the published one loses nothing on the way back. What lies in the engine as it was
    published is read in place, and where that is, is found once."""

    def __init__(self, plan: Mapping[str, list[Copy]], entries: Sequence[Entry]):
        self.plan, self.lines = plan, [entry[:3] for entry in entries]
        in_place: list[tuple[int, Tensor]] = []
        self._others: list[int] = []
        for number, entry in enumerate(entries):
            dtype, copies = getattr(torch, entry.dtype), plan.get(entry.name, ())
            wholes = [copy.target for copy in copies if copy.whole]  # several where experts are held more than once
            if wholes and all(target.dtype == dtype and target.is_contiguous() for target in wholes):
                in_place += [(number, target) for target in wholes]
            elif copies:
                self._others.append(number)
        self._numbers = [number for number, _ in in_place]
        self._reading = Reading([target for _, target in in_place])

    @torch.no_grad()
    def fingerprints(self) -> list[tuple[int, int]]:
        """(place among the entries, fingerprint of what the engine holds)."""
        pairs = [(number, tensor) for number in self._others for tensor in self._turned(*self.lines[number])]
        found = zip((n for n, _ in pairs), fingerprints([tensor for _, tensor in pairs]), strict=True)
        held = [number % (1 << 64) for number in self._reading().tolist()]
        return [*found, *zip(self._numbers, held, strict=True)]

    def differing(self, entries: Sequence[Entry]) -> tuple[int, list[str]]:
        """As the function of this name; `entries` are those that this was made for, with other fingerprints."""
        found = self.fingerprints()
        wrong = [entries[at].name for at, number in sorted(found) if number != entries[at].fingerprint]
        return len({at for at, _ in found}), list(dict.fromkeys(wrong))

    def _turned(self, name: str, shape: tuple[int, ...], dtype_name: str) -> Iterator[Tensor]:
        """A tensor that the engine holds in another dtype or in parts."""
        copies, dtype = self.plan[name], getattr(torch, dtype_name)
        wholes = [copy for copy in copies if copy.whole]
        for copy in wholes:
            yield copy.target.to(dtype)
        if not wholes:
            covered = torch.zeros(shape, dtype=torch.bool)
            tensor = torch.empty(shape, dtype=dtype, device=copies[0].target.device)
            for copy in copies:
                copy.part(covered).fill_(True)
                copy.part(tensor).copy_(copy.target)
            if covered.all():
                yield tensor


def differing(plan: Mapping[str, list[Copy]], entries: Sequence[Entry]) -> tuple[int, list[str]]:
    """How many tensors could be read back, and the names of those that are not what was published."""
    return ReadBack(plan, entries).differing(entries)


def reload(worker: Any, weights: Weights) -> None:
    """vLLM's own way."""
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
    model: torch.nn.Module, config: Any, shapes: Mapping[str, tuple[int, ...]], entries: Sequence[Entry]
) -> dict[str, list[Copy]]:
    """The copies that the model's loaders make of these published tensors. Raises CannotPlan."""
    if config.quantization is None:
        return plan_copies(model.load_weights, shapes)
    dtypes = {entry.name: getattr(torch, entry.dtype) for entry in entries}
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


class Installer:
    """Brings updates into the model of one worker in this process. `direct` None: goes directly once the first update
    has shown that it is right; False: always vLLM's way."""

    def __init__(self, worker: Any, shapes: Mapping[str, tuple[int, ...]], direct: bool | None = None):
        self.worker, self.shapes = worker, shapes
        self.direct = direct if worker.model_runner.device.type == "cuda" else False
        self.plan: dict[str, list[Copy]] = {}
        self._read_back: ReadBack | None = None

    def install(self, weights: Weights, manifest: Manifest | None) -> Installed:
        """Installs a complete set. Raises CorruptWeights when the engine then holds something else than was
        published, naming the tensors."""
        runner = self.worker.model_runner
        counted = _Counted(weights)
        way = "direct" if self.direct else "reload"
        if self.direct:
            copy_weights(self.plan, counted)
            for part in served_models(runner):
                refresh_derived(part, runner.model_config.dtype)
        else:
            reload(self.worker, counted)
            if self.direct is None and manifest is not None:
                self._decide(manifest)
        verified, wrong = self.differing(manifest) if self.direct and manifest else (0, [])
        if wrong:
            raise CorruptWeights(f"after the update the engine holds other weights than were published: {few(wrong)}")
        return Installed(way, counted.count, verified)

    def differing(self, manifest: Manifest) -> tuple[int, list[str]]:
        """See the function of this name."""
        held = self._read_back
        if held is None or held.plan is not self.plan or held.lines != [entry[:3] for entry in manifest.entries]:
            self._read_back = held = ReadBack(self.plan, manifest.entries)
        return held.differing(manifest.entries)

    def _decide(self, manifest: Manifest) -> None:
        """Called with the published weights in the models, brought there by vLLM."""
        self.direct = False
        runner = self.worker.model_runner
        try:
            plan: dict[str, list[Copy]] = {}
            for model in served_models(runner):
                for name, copies in planned(model, runner.model_config, self.shapes, manifest.entries).items():
                    plan.setdefault(name, []).extend(copies)
                read_where_loaded(model, runner.model_config)
            self.plan = plan
        except CannotPlan as error:
            log.warning("weights go through vLLM's reload_weights, which is slower: %s", error)
            return
        verified, other = self.differing(manifest)
        placed = len({entry.name for entry in manifest.entries} & self.plan.keys())
        self.direct = not other and verified == placed
        if not self.direct:
            log.warning(
                "weights go through vLLM's reload_weights, which is slower: this engine keeps %d of %d tensors in "
                "another form or dtype than they were published in (%s) and %d in parts",
                len(other), placed, few(other), placed - verified,
            )  # fmt: skip


class _Counted:
    """Passes tensors on and counts them."""

    def __init__(self, weights: Weights):
        self.weights, self.count = weights, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for pair in self.weights:
            self.count += 1
            yield pair


def few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
