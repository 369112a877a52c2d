"""A V3 policy whose weights lie on several ranks: sharded, gathered a parameter at a time, filled from a folder.

In BF16 the sharded parameters are the FP32 masters, and FSDP gathers them rounded; experts that no rank shares (as
many expert ranks as dp ranks) stay BF16 parameters of their rank, with the optimizer's masters beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree as pytree

from trainer.checkpoint import hf
from trainer.checkpoint.folder import FolderReader
from trainer.checkpoint.model_folder import read_config
from trainer.model.moe import MoE, Routing
from trainer.model.v3 import V3Model, V3Output
from trainer.model.v3_config import V3Config
from trainer.parallel.experts import ExpertExchange, LocalExperts
from trainer.parallel.ranks import Ranks
from trainer.policy import Policy, PolicyOptions, V3Policy, load_policy

# FSDP looks for the tensors of a module's output, whose gradients start its work, through these.
for _record in (V3Output, Routing):
    _names = [field.name for field in dataclasses.fields(_record)]
    pytree.register_pytree_node(
        _record,
        lambda record, names=_names: ([getattr(record, name) for name in names], None),
        lambda values, _, kind=_record: kind(*values),
    )


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint lies: in the parameter or buffer `owner`, from element `start`."""

    owner: str
    start: int
    shape: torch.Size


def checkpoint_places(model: V3Model, mtp: bool = True) -> dict[str, Place]:
    """Checkpoint name -> place, in the checkpoint's order. Every checkpoint tensor is one piece of its owner's memory.
    The model may be on meta; it must be whole."""
    owners = {t.untyped_storage()._cdata: name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        name: Place(owners[view.untyped_storage()._cdata], view.storage_offset(), view.shape)
        for name, view in hf.named_checkpoint_tensors(model, mtp)
    }


def shard_model(model: V3Model, ranks: Ranks, dtype: torch.dtype, trained: bool = True) -> None:
    """Makes `model`, whole and in `dtype` on the CPU or on meta, this rank's part of it, on the ranks' device (or on
    meta). A trained BF16 model keeps FP32 shards."""
    mixed = trained and dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        cast_forward_inputs=False,
    )
    common: dict[str, Any] = {"mesh": ranks.dp, "mp_policy": policy}
    own: set[nn.Parameter] = set()  # experts that no other rank has a part of
    blocks = [*model.layers, *model.mtp_layers]
    exchange = None
    for layer in blocks:
        moe = next((m for m in layer.modules() if isinstance(m, MoE)), None)
        if moe is not None and ranks.options.ep > 1:
            exchange = exchange or ExpertExchange(ranks.ep_group, model.config.n_routed_experts, ranks.device)
            moe.experts = LocalExperts(moe.experts, ranks.ep_rank, ranks.options.ep)
            moe.exchange = exchange
        own_here: set[nn.Parameter] = set()
        if moe is not None and ranks.options.ep > 1 and ranks.efsdp.size() == 1:
            moe.experts = moe.experts.to_empty(device=ranks.device) if _is_meta(moe) else moe.experts.to(ranks.device)
            own_here = set(moe.experts.parameters())
        if mixed:
            for parameter in layer.parameters():
                if parameter not in own_here:
                    parameter.data = parameter.data.float()
        if moe is not None and ranks.options.ep > 1 and not own_here:
            fully_shard(moe.experts, reshard_after_forward=ranks.options.reshard, **{**common, "mesh": ranks.efsdp})
        fully_shard(layer, reshard_after_forward=ranks.options.reshard, ignored_params=own_here or None, **common)
        own |= own_here
    if mixed:
        for parameter in (model.embed, model.head, model.norm.weight):
            if parameter is not None:
                parameter.data = parameter.data.float()
    fully_shard(model, reshard_after_forward=False, ignored_params=own or None, **common)
    model.register_forward_pre_hook(_hide_bounds, prepend=True)
    model.register_forward_pre_hook(_show_bounds)
    if exchange is not None:
        model.register_forward_pre_hook(lambda _, args, exchange=exchange: exchange.begin(len(args[0])))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The sum over ranks: a loss has the whole step's denominators.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Said, because the host, which waits for the experts' counts, is never far ahead of the GPU.
    for before, after in zip([model, *blocks], blocks, strict=False):
        before.set_modules_to_forward_prefetch([after, *_sharded_experts(after)])


class _Bounds:
    """The documents' bounds on their way past FSDP, which would move them to the GPU: they are read on the CPU."""

    def __init__(self, bounds: Tensor) -> None:
        self.bounds = bounds


def _hide_bounds(_, args: tuple) -> tuple:
    tokens, positions, bounds, *rest = args
    return tokens, positions, _Bounds(bounds), *rest


def _show_bounds(_, args: tuple) -> tuple:
    tokens, positions, hidden, *rest = args
    return tokens, positions, hidden.bounds, *rest


def _is_meta(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def _sharded_experts(layer: nn.Module) -> list[FSDPModule]:
    return [m for m in layer.modules() if isinstance(m, LocalExperts) and isinstance(m, FSDPModule)]


class ShardedV3Policy(V3Policy):
    """This rank's part of a V3 policy. Its methods are collectives: every rank calls the same ones in the same
    order."""

    def __init__(self, module: V3Model, options: PolicyOptions, ranks: Ranks, trained: bool = True) -> None:
        """`module` whole, on the CPU or on meta; see `shard_model`."""
        super().__init__(module, options, ranks.device)
        self.ranks = ranks
        self.dtype = getattr(torch, options.dtype)
        with torch.device("meta"):
            self.template = V3Model(module.config).to(self.dtype)  # whole, of no memory: names and shapes
        self.places = checkpoint_places(self.template)
        self._buffers = {name for name, _ in self.template.named_buffers()}  # every rank has all of them
        shard_model(module, ranks, self.dtype, trained)
        if module.norm.weight.is_meta:
            module.to_empty(device=ranks.device)
        else:
            module.to(ranks.device)
        # FSDP cannot pass over a module without gradients that was never gathered: here depths that are not trained.
        for layer in module.mtp_layers:
            for part in [layer, *_sharded_experts(layer)]:
                part.unshard()
                part.reshard()

    # --- parts and wholes --------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Gives up gathered weights: what the module holds after it are the shards, and nothing stale is used next."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def parts(self) -> dict[str, Tensor]:
        """This rank's part of every parameter and buffer, the live memory."""
        self.settle()
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: (t.to_local() if isinstance(t, DTensor) else t).detach() for name, t in named}

    def mesh_of(self, name: str) -> DeviceMesh | None:
        """Over which the parameter is split, along its first dimension by every dimension of the mesh in turn; None:
        every rank has all of it."""
        if self.ranks.options.ep > 1 and ".experts." in name:
            return self.ranks.experts
        return None if name in self._buffers else self.ranks.dp

    def distributed(self, name: str, part: Tensor) -> Tensor:
        """`part`, which belongs to the parameter `name` and is split as that is (a moment, say), as a DTensor."""
        mesh = self.mesh_of(name)
        if mesh is None:
            return part
        whole = self.template.get_parameter(name)
        return DTensor.from_local(
            part, mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def rows_of(self, name: str) -> tuple[int, int]:
        """First row and number of rows of the whole parameter that this rank's part is."""
        mesh = self.mesh_of(name)
        return self._rows(name, mesh, mesh.ndim if mesh is not None else 0)

    def _rows(self, name: str, mesh: DeviceMesh | None, dimensions: int) -> tuple[int, int]:
        """First row and number of rows of this rank's part where the first `dimensions` of the mesh alone split."""
        first, rows = 0, self._whole_shape(name)[0]
        for dimension in range(dimensions):
            assert mesh is not None
            size, place = mesh.size(dimension), mesh.get_local_rank(dimension)
            chunk = -(-rows // size)  # as torch.chunk divides
            first, rows = first + min(place * chunk, rows), max(0, min(chunk, rows - place * chunk))
        return first, rows

    def _whole_shape(self, name: str) -> torch.Size:
        module, _, attribute = name.rpartition(".")
        return getattr(self.template.get_submodule(module), attribute).shape

    # --- weights out -------------------------------------------------------------------------------------------------

    def weights(self, mtp: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As `Policy.weights`, whole tensors in the policy's dtype on every rank, gathered as they are asked for: a
        layer's parameters are held at a time. Every rank must exhaust it."""
        parts, held, layer = self.parts(), {}, None
        for name, place in self._placed(mtp):
            held, layer = self._still_held(held, layer, place)
            if place.owner not in held:
                held[place.owner] = self.whole(place.owner, self._in_dtype(parts, place.owner)).flatten()
            yield name, held[place.owner][place.start : place.start + place.shape.numel()].view(place.shape)

    def layout(self, mtp: bool = False) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Names, shapes and dtypes of `weights`, without a gather."""
        dtypes = {name: buffer.dtype for name, buffer in self.template.named_buffers()}
        return [(name, place.shape, dtypes.get(place.owner, self.dtype)) for name, place in self._placed(mtp)]

    def owners(self, mtp: bool = False) -> list[int]:
        """The rank that has each tensor in `owned_weights`: an expert's own, rank 0 for all else."""
        return [self._expert_rank(place) or 0 for _, place in self._placed(mtp)]

    def owned_weights(self, mtp: bool = False) -> Iterator[tuple[str, Tensor | None]]:
        """As `weights`, each tensor on its owner alone and None on the other ranks. Experts do not leave the ranks
        that share them. Every rank must exhaust it."""
        parts, held, layer = self.parts(), {}, None
        for name, place in self._placed(mtp):
            held, layer = self._still_held(held, layer, place)
            rank, start = self._expert_rank(place), place.start
            if place.owner not in held:
                part = self._in_dtype(parts, place.owner)
                held[place.owner] = self.whole(place.owner, part, 0 if rank is None else 1).flatten()
            if self.ranks.rank != (rank or 0):
                yield name, None
                continue
            if rank is not None:
                start -= rank * self._whole_shape(place.owner).numel() // self.ranks.options.ep
            yield name, held[place.owner][start : start + place.shape.numel()].view(place.shape)

    def _placed(self, mtp: bool) -> Iterator[tuple[str, Place]]:
        return ((name, place) for name, place in self.places.items() if mtp or not self._is_mtp(name))

    def _still_held(self, held: dict[str, Tensor], layer: str | None, place: Place) -> tuple[dict[str, Tensor], str]:
        """What is gathered and may be asked for again, and the layer that comes."""
        unit = ".".join(place.owner.split(".")[:2])
        if unit != layer:  # embedding and head come back behind the layers: they stay
            held = {owner: whole for owner, whole in held.items() if "layers." not in owner}
        return held, unit

    def _in_dtype(self, parts: dict[str, Tensor], name: str) -> Tensor:
        return parts[name] if name in self._buffers else parts[name].to(self.dtype)

    def _expert_rank(self, place: Place) -> int | None:
        """The first of the ranks that share an expert's tensor; None for what all ranks share."""
        ranks = self.ranks.options.ep
        if ranks == 1 or ".experts." not in place.owner:
            return None
        return place.start * ranks // self._whole_shape(place.owner).numel()

    def whole(self, name: str, part: Tensor, first: int = 0) -> Tensor:
        """What `part` is a part of, see `distributed`, on every rank: gathered over the mesh's dimensions from `first`
        on, the last first. (Not over a flattened mesh: the ranks of its group are sorted, and so not in the experts'
        order.)"""
        mesh = self.mesh_of(name)
        if mesh is None:
            return part
        for dimension in reversed(range(first, mesh.ndim)):
            rows = self._rows(name, mesh, dimension)[1]
            along = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[dimension]]
            if mesh.size(dimension) > 1:
                whole = torch.Size([rows, *self._whole_shape(name)[1:]])
                stride = torch.empty(whole, device="meta").stride()
                part = DTensor.from_local(
                    part, along, [Shard(0)], run_check=False, shape=whole, stride=stride
                ).full_tensor()
        return part

    def _is_mtp(self, name: str) -> bool:
        pieces = name.split(".")
        return pieces[1] == "layers" and int(pieces[2]) >= self.module.config.num_hidden_layers

    def save(self, folder: str | Path, dtype: str | None = None) -> None:
        """As `Policy.save`, in the policy's dtype: rank 0 writes, the others take part in the gathering."""
        if dtype not in (None, self.options.dtype):
            raise ValueError(f"a sharded policy is saved in its dtype {self.options.dtype}, not in {dtype}")
        if self.ranks.rank == 0:
            super().save(folder)
        else:
            for _ in self.weights(mtp=True):
                pass

    def _save_weights(self, folder: Path) -> None:
        hf.save_folder(self.template, folder, tensors=self.weights(mtp=True))

    # --- weights in --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Every rank reads the folder, one tensor at a time, and keeps its part."""
        self._check_architecture(folder)
        reader = FolderReader(folder)
        firsts: dict[tuple[str, int], str] = {}
        for name, place in self.places.items():
            firsts.setdefault((place.owner, place.start), name)
        wrong = list(reader.problems)
        wrong += [f"missing: {name}" for name in firsts.values() if name not in reader.entries.keys() | reader.lost]
        for name, entry in reader.entries.items():
            if name.endswith(hf.SCALE):
                continue
            if name not in self.places:
                wrong.append(f"unexpected: {name} {list(entry.shape)}")
            elif self.places[name].shape != entry.shape:
                wrong.append(f"shape: {name} is {list(entry.shape)}, expected {list(self.places[name].shape)}")
        if wrong:
            hf.refuse(f"{folder} does not fit the model", wrong)
        parts = self.parts()
        ranges = {}
        for name in parts:
            (first, rows), row = self.rows_of(name), self._whole_shape(name)[1:].numel()
            ranges[name] = (first * row, (first + rows) * row)
        for name, tensor in reader:
            place = self.places[name]
            begin, end = ranges[place.owner]
            low, high = max(begin, place.start), min(end, place.start + tensor.numel())
            if low < high and firsts[place.owner, place.start] == name:
                values = tensor.flatten()[low - place.start : high - place.start]
                if not place.owner.endswith(".bias"):
                    values = values.to(self.dtype)
                parts[place.owner].view(-1)[low - begin : high - begin].copy_(values)

    @torch.no_grad()
    def copy_weights_from(self, other: Policy) -> None:
        """Takes over the weights of a policy that is sharded in the same way."""
        assert isinstance(other, ShardedV3Policy)
        theirs = other.parts()
        for name, part in self.parts().items():
            part.copy_(theirs[name])

    def frozen_copy(self) -> Policy:
        """A second policy with the same weights, never trained, in the policy's dtype and without masters."""
        with torch.device("meta"):
            module = V3Model(self.module.config, self.options.recipe).to(self.dtype)
        copy = ShardedV3Policy(module.requires_grad_(False), self.options, self.ranks, trained=False)
        copy.copy_weights_from(self)
        copy.replays_routing = False
        return copy


def load_sharded_policy(options: PolicyOptions, ranks: Ranks, seed: int = 0) -> ShardedV3Policy:
    """`trainer.policy.load_policy` for several ranks: a folder's weights go straight into the shards; new weights are
    drawn whole on every rank's CPU. ValueError for another architecture than DeepSeek-V3."""
    if options.path is None:
        policy = load_policy(options, "cpu", seed)
        if not isinstance(policy, V3Policy):
            raise ValueError(_ONLY_V3)
        return ShardedV3Policy(policy.module, options, ranks)
    if read_config(Path(options.path)).get("model_type") != "deepseek_v3":
        raise ValueError(_ONLY_V3)
    with torch.device("meta"):
        config = V3Config.load(options.path)
        module = V3Model(config, options.recipe, options.activation_checkpointing)
    policy = ShardedV3Policy(module.to(getattr(torch, options.dtype)), options, ranks)
    policy.load_weights(Path(options.path))
    policy.try_saving()
    return policy


_ONLY_V3 = "training on several GPUs is for DeepSeek-V3 policies; other architectures train on one (dp=1, pp=1)"
