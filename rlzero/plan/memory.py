"""Bytes that one process holds at its fullest moment: a trainer rank's, counted tensor by tensor from what its kernels
keep for the backward pass, and an engine's. Plans of runs and of architectures count with it.

The trainer's count follows trainer/model (what each autograd function saves), model/head.py and optimizer.py
(when which gradients exist); tests hold it against measured peaks. Everything is for one micro-batch of documents of
mixed length, of as many tokens as a micro-batch may have, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rlzero.plan.size import LayerSize
from rollout.transport.buckets import BUCKET_BYTES
from trainer.model.head import CHUNK_BYTES, KEEP_BYTES

if TYPE_CHECKING:
    from trainer.model.v3_config import V3Config

BF16, FP32 = 2, 4
MIB = 1 << 20
# Not counted by torch's allocator, so not by the tests either: what CUDA, its libraries and the loaded kernels take of
# a device for one process, and NCCL's channels where ranks or other GPUs are talked to.
CONTEXT_BYTES = 600 * MIB
NCCL_BYTES = 700 * MIB
# Blocks that torch's allocator holds and cannot use: mixed lengths ask for other sizes in every micro-batch.
UNUSABLE_SHARE = 0.04  # of activations and gradients
UNUSABLE_SHARE_OF_RANKS = 0.18  # the same where ranks share weights: blocks wait for the streams that messages use
MARGIN_SHARE = 0.06  # of the device, left free by a plan: half of what the estimate may be wrong by

Recompute = Literal["none", "selective", "full"]


def recompute_of(activation_checkpointing: bool | str) -> Recompute:
    return {False: "none", True: "full"}.get(activation_checkpointing, "selective")  # type: ignore[call-overload]


# ---- the trainer ----


@dataclass(frozen=True)
class TrainerWork:
    """What one trainer rank does in an update. `equal`: all documents are of one length, which another attention kernel
    takes. Of its pipeline stage: whether it is the `first` and the `last`, and how many micro-batches are `in_flight`,
    that is, before their backward pass, at a time."""

    tokens: int  # of a micro-batch
    micro_batches: int
    recompute: Recompute = "none"
    width: int = BF16  # of weights and activations
    moments: int = FP32
    master: int = 2  # bytes of a BF16 weight's master beside it: AdamW keeps the lower half (trainer.masters), Muon all
    reference: bool = False
    equal: bool = False
    dp: int = 1
    ep: int = 1
    reshard: bool = False
    reduce_each: bool = False
    nccl: bool = False  # weights travel to engines on other GPUs
    fp8: bool = False  # the recipe of Linears and experts
    first: bool = True
    last: bool = True
    in_flight: int = 1
    cuda: bool = True


@dataclass(frozen=True)
class Held:
    """Bytes of a process by part at its fullest moment, and how much of them stays when it does not work."""

    parts: dict[str, int] = field(default_factory=dict)
    at_rest: int = 0

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What torch's allocator has given out at that moment: measured as `max_memory_allocated`."""
        return sum(nbytes for name, nbytes in self.parts.items() if name not in OUTSIDE)

    @property
    def exact(self) -> int:
        """The parts that are no estimates."""
        return sum(nbytes for name, nbytes in self.parts.items() if not name.endswith(("about", "at most")))

    def lines(self) -> list[str]:
        """The parts as lines of text."""
        return [f"             {size(nbytes):>10}  {part}" for part, nbytes in self.parts.items() if nbytes]


CONTEXT, UNUSABLE, BUFFERS = "CUDA context and libraries", "blocks the allocator cannot use, about", "sync's buffers"
OUTSIDE = (CONTEXT, UNUSABLE)


def _input_bytes(width: int, fp8: bool) -> float:
    """Of one value that a product keeps of its input: E4M3 with an FP32 scale for every 128, or `width`."""
    return 1 + FP32 / 128 if fp8 else width


def kept_of_attention(m: V3Config, width: int = BF16, equal: bool = False, fp8: bool = False) -> int:
    """Bytes that the attention's half of a layer keeps of a token, its input included."""
    heads, latent = m.num_attention_heads, (m.q_lora_rank or 0) + m.kv_lora_rank
    inputs = m.hidden_size + latent  # of products: the norms of the layer's input and of the latents
    values = m.hidden_size + latent + m.qk_rope_head_dim  # the layer's input; one product's latents and rotated key
    values += 2 * heads * m.qk_head_dim  # queries and keys
    if equal:  # the values are a view of the up-projection; the result is the output projection's input
        values += heads * (m.qk_nope_head_dim + m.v_head_dim) + heads * m.v_head_dim
    else:  # flash attention's values and result are as wide as keys; the result again, cut
        values += 2 * heads * m.qk_head_dim
        inputs += heads * m.v_head_dim
    return round(values * width + inputs * _input_bytes(width, fp8)) + FP32 * (heads + 3)  # log-sum-exp, three 1/rms


def kept_of_mlp(m: V3Config, dense: bool, width: int = BF16, rows: bool = True, fp8: bool = False) -> int:
    """Bytes that the MLP's half of a layer keeps of a token. `rows`: the experts' copies of the tokens and their
    activations too, which selective checkpointing makes again."""
    values, inputs = m.hidden_size, m.hidden_size  # the residual's sum and its norm
    wide = m.intermediate_size if dense else m.n_shared_experts * m.moe_intermediate_size
    values, numbers = values + 2 * wide, FP32  # gate and up; 1/rms
    if dense:
        inputs += wide  # their product
    else:
        chosen = m.num_experts_per_tok
        values += chosen * 2 * m.moe_intermediate_size
        if rows:
            inputs += chosen * (m.hidden_size + m.moe_intermediate_size)
        numbers += FP32 * m.n_routed_experts + chosen * (8 + 3 * FP32)  # scores; experts, weights, places
    return round(values * width + inputs * _input_bytes(width, fp8)) + numbers


def kept_of_layer(
    m: V3Config, dense: bool, recompute: Recompute, width: int = BF16, equal: bool = False, fp8: bool = False
) -> int:
    """Bytes of one token that a layer keeps until its backward pass."""
    if recompute == "full":
        return m.hidden_size * width
    return kept_of_attention(m, width, equal, fp8) + kept_of_mlp(m, dense, width, recompute == "none", fp8)


def backward_of_layer(m: V3Config, dense: bool, recompute: Recompute, width: int = BF16) -> int:
    """Bytes of one token that a layer's backward pass takes at its widest, beside what was kept and the gradients of
    weights: in the MLP, where gradients of rows, of activations and of gate and up stand beside each other."""
    if dense:
        return (2 * m.hidden_size + 4 * m.intermediate_size) * width
    made_again = recompute == "selective"
    row = m.hidden_size + (3 + made_again) * m.moe_intermediate_size
    return (m.num_experts_per_tok * row + 2 * m.hidden_size) * width


@dataclass(frozen=True)
class _Gradients:
    """Bytes of a parameter's gradient before and after a micro-batch's backward pass, for weights that ranks share and
    for routed experts; and of those of a layer in whose backward pass the GPU is."""

    dense: tuple[float, float]
    routed: tuple[float, float]
    passing: float = 0.0


def _gradients(work: TrainerWork) -> Iterator[_Gradients]:
    """Of the first micro-batches of an update, which differ, and of the last."""
    count = min(work.micro_batches, 4)
    if work.width == FP32:
        alone = [(0.0, 4.0), *[(4.0, 4.0)] * (count - 1)]
    else:  # one micro-batch's are BF16; from the second on they are summed in FP32, beside which a new one passes
        alone = [(0.0, 2.0), (2.0, 4.0), *[(4.0, 4.0)] * max(count - 2, 0)][:count]
    passing = 0.0 if count == 1 else float(work.width)
    for i, own in enumerate(alone):
        if work.dp == 1:
            yield _Gradients(own, own, passing)
            continue
        shard = 4.0 / work.dp
        if work.reduce_each or count == 1:  # summed over ranks at once: FP32 on their way, two layers at a time
            shared = (shard if i else 0.0, shard)
            on_the_way = 2.0 * (work.width + FP32)
        else:
            shared = (4.0 if i else 0.0, shard if i == count - 1 else 4.0)
            on_the_way = float(work.width)
        yield _Gradients(shared, own if work.ep == work.dp else shared, on_the_way)


def trainer_memory(m: V3Config, layers: Sequence[LayerSize], work: TrainerWork, mtp: int = 0, buffers: int = 0) -> Held:
    """One trainer rank. `layers` are those of its stage that are trained; `mtp` counts parameters of multi-token
    prediction, which reinforcement learning holds and does not train; `buffers` are the weight sync's."""
    table = m.vocab_size * m.hidden_size
    embedding = table * (work.first and not (work.last and m.tie_word_embeddings))
    if work.last and not work.first and m.num_nextn_predict_layers:
        embedding += table  # a copy of the first stage's, which multi-token prediction reads
    head = table * work.last
    dense = sum(layer.dense for layer in layers) + embedding + head + m.hidden_size * work.last
    routed = sum(layer.routed for layer in layers) // work.ep
    rest = _states(dense, routed, mtp, work)
    if work.fp8:  # straight and turned: the products with the weight and with its transpose need one each
        rest["FP8 forms of the weights"] = 2 * (sum(layer.quantized for layer in layers) + routed)
    best: dict[str, int] = {}
    for gradients in _gradients(work):
        for moment in _moments(m, layers, (embedding, head), gradients, work):
            if sum(moment.values()) > sum(best.values()):
                best = moment
    context = CONTEXT_BYTES + (NCCL_BYTES if work.dp > 1 or work.nccl else 0)
    rest |= {BUFFERS: buffers, CONTEXT: context if work.cuda else 0}
    unusable = (UNUSABLE_SHARE if work.dp == 1 else UNUSABLE_SHARE_OF_RANKS) if work.cuda else 0
    parts = {**rest, **best, UNUSABLE: round(unusable * sum(best.values()))}
    return Held({k: v for k, v in parts.items() if v}, sum(rest.values()))


def _states(dense: int, routed: int, mtp: int, work: TrainerWork) -> dict[str, int]:
    """What is there all the time: weights, masters, moments, reference. `routed` is what this rank computes with."""
    w, low = work.width, work.width < FP32
    name = "BF16" if low else "FP32"
    n, moments = dense + routed, f"optimizer moments ({'BF16' if work.moments == BF16 else 'FP32'})"
    if work.dp == 1:
        return {
            f"weights ({name})": w * (n + mtp),
            "master weights": work.master * (n + mtp) if low else 0,
            moments: 2 * work.moments * n,
            "reference weights": w * (n + mtp) if work.reference else 0,
        }
    alone = work.ep == work.dp  # no other rank has these experts: plain BF16 weights with masters
    own = routed if alone else 0
    shards = -(-(dense + mtp) // work.dp) + (own or -(-routed * work.ep // work.dp))
    return {
        "master weights" if low else f"weights ({name})": FP32 * (shards - own) + (work.master if low else FP32) * own,
        f"weights of this rank's experts ({name})": w * own if low else 0,
        moments: 2 * work.moments * (shards - -(-mtp // work.dp)),
        "reference weights": w * shards if work.reference else 0,
    }


def _moments(
    m: V3Config, layers: Sequence[LayerSize], tables: tuple[int, int], gradients: _Gradients, work: TrainerWork
) -> Iterator[dict[str, int]]:
    """Activations, gradients and gathered weights at the moments of a micro-batch that can be the fullest: in the head,
    between forward and backward, and in the backward pass of every layer."""
    n, w, h = work.tokens, work.width, m.hidden_size
    embedding, head = tables
    latent = (
        (m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim) * h * w if m.q_lora_rank else 0
    )  # weights side by side
    kept = [n * kept_of_layer(m, not x.routed, work.recompute, w, work.equal, work.fp8) + latent for x in layers]
    if work.recompute == "full":
        kept = [nbytes - latent for nbytes in kept]
    kept_name = f"activations of {'one micro-batch' if work.in_flight == 1 else f'{work.in_flight} micro-batches'}"
    kept_name += "" if work.cuda and not work.fp8 else ", about"
    ends = n * (4 * h * w + m.qk_rope_head_dim * FP32 + 64)  # final norm, the head's rows, rotation, tokens
    ends += (work.in_flight - 1) * sum(kept)

    def so_far(done: Sequence[LayerSize], to_come: Sequence[LayerSize], tables_after: bool) -> int:
        size = sum(x.dense for x in done) * gradients.dense[1] + sum(x.dense for x in to_come) * gradients.dense[0]
        experts = [sum(x.routed for x in part) / work.ep for part in (to_come, done)]
        size += experts[0] * gradients.routed[0] + experts[1] * gradients.routed[1]
        size += head * (gradients.dense[1] if tables_after else gradients.dense[0])
        return round(size + embedding * gradients.dense[0])  # the embedding's comes last

    def gathered(in_use: Sequence[LayerSize]) -> int:
        """Whole weights of ranks that keep shards: of all layers until their backward pass, or of two at a time."""
        if work.dp == 1:
            return 0
        sizes = [x.dense + (0 if work.ep == work.dp else x.routed // work.ep) for x in in_use]
        return w * (embedding + head + (sum(sorted(sizes)[-2:]) if work.reshard else sum(sizes)))

    gathered_name = "weights gathered"
    yield {
        kept_name: sum(kept) + ends,
        "gradients": so_far((), layers, False),
        gathered_name: gathered(layers),
        "the head": _head(m, n, w, work.cuda) if work.last else 0,
    }
    for i in reversed(range(len(layers))):
        dense, passing = not layers[i].routed, layers[i].dense + layers[i].routed // work.ep
        again = n * kept_of_layer(m, dense, "none", w, work.equal, work.fp8) + latent if work.recompute == "full" else 0
        yield {
            kept_name: sum(kept[: i + 1]) + ends,
            "gradients": so_far(layers[i:], layers[:i], True) + round(gradients.passing * passing),
            gathered_name: gathered(layers[: i + 2]),
            "a layer made again": again,
            "a layer's backward pass": n * backward_of_layer(m, dense, work.recompute, w),
        }
    if work.first:
        table = m.vocab_size * h
        last = so_far(layers, (), True) + round(gradients.dense[1] * table) + table * w
        yield {kept_name: ends, "gradients": last, gathered_name: gathered(())}


def _head(m: V3Config, tokens: int, width: int, cuda: bool) -> int:
    """The most that log-probabilities of `tokens` and their gradient take, see trainer/model/head.py."""
    chunk = min(tokens * m.vocab_size * FP32, CHUNK_BYTES["cuda" if cuda else "cpu"])
    table, rows = m.vocab_size * m.hidden_size, tokens * m.hidden_size * width
    if (kept := tokens * m.vocab_size * width) <= KEEP_BYTES:
        return kept + max(chunk, rows + table * width)
    return rows + table * (FP32 + width) + chunk + chunk * width // FP32


def sync_buffers(weight_bytes: int) -> int:
    """What CUDA IPC packs weights into, two buckets (rollout/transport/ipc.py)."""
    return min(2 * BUCKET_BYTES, -(-weight_bytes // MIB) * MIB)


# ---- the engine ----

BLOCK_TOKENS = 64  # of vLLM's cache for MLA
GRAPH_BYTES = MIB // 4  # of a captured CUDA graph, for each layer
GRAPH_SIZES, GRAPH_LIMIT = 8, 512  # vLLM captures batches of 1, 2, 4, then every 8th up to twice max_batch or this
# Attention's and the experts' scratch memory and what vLLM's allocator cannot use: what was left beside all other parts
# of the engine in benchmarks/grpo_gpu.py on one H100 (8,192 batched tokens), 1.8 GiB awake and 2.3 with sleep mode.
ENGINE_WORKSPACE_BYTES = 2100 * MIB
DEFAULT_BATCHED_TOKENS = 2048  # vLLM's where nobody sets max_num_batched_tokens


@dataclass(frozen=True)
class EngineWork:
    weight_bytes: int
    token_bytes: int  # that one token leaves in the cache
    longest: int  # tokens of prompt and completion
    running: int  # requests at a time
    vocabulary: int
    layers: int
    hidden: int
    derived_bytes: int = 0  # made of the weights: MLA's absorbed projections
    widest: int = 0  # values of a token in the widest moment of a layer
    batched_tokens: int = DEFAULT_BATCHED_TOKENS
    nccl_buffers: int | None = None  # that weights arrive in from another GPU; None: they do not
    graphs: int | None = None  # captured batch sizes; None: vLLM's own, 0: none (enforce_eager)


def cache_for(requests: int, longest: int, token_bytes: int) -> int:
    """A cache that holds `requests` at full length at once, in whole blocks, and vLLM's one empty block."""
    blocks = -(-(longest + 1) // BLOCK_TOKENS)
    return (requests * blocks + 1) * BLOCK_TOKENS * token_bytes


def engine_memory(work: EngineWork, cache_bytes: int) -> Held:
    """One engine. `at_rest` is what sleep level 2 does not give back."""
    sizes = work.graphs
    if sizes is None:
        sizes = min(2 * work.running, GRAPH_LIMIT) // GRAPH_SIZES + 3
    parts = {
        "weights": work.weight_bytes + work.derived_bytes,
        "cache": cache_bytes,
        "activations of a step, about": work.batched_tokens * (work.widest + 4 * work.hidden) * BF16,
        # float32 logits, their log-softmax, probabilities and the noise that picks a token
        "the sampler, about": 4 * work.running * work.vocabulary * FP32,
        "scratch memory, about": ENGINE_WORKSPACE_BYTES,
        "CUDA graphs, about": 2 * sizes * work.layers * GRAPH_BYTES,
        BUFFERS: work.nccl_buffers or 0,
        CONTEXT: CONTEXT_BYTES + (NCCL_BYTES if work.nccl_buffers is not None else 0),
    }
    sleeping = sum(v for k, v in parts.items() if k not in ("weights", "cache"))
    return Held({k: v for k, v in parts.items() if v}, sleeping)


# ---- words ----


def count(number: float) -> str:
    """Parameters in words: 5.3 M, 671 B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {suffix}"
    return str(int(number))


def size(nbytes: float) -> str:
    """Bytes in words: 1.5 GiB."""
    for limit, suffix in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.3g} {suffix}"
    return f"{nbytes / 1024:.3g} KiB"
