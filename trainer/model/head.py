"""The output head: log-probabilities and entropies of a whole batch without ever holding its logits.

A vocabulary of 129,280 makes the logits of 8,192 tokens 4 GB in float32. They are made a chunk of tokens at a time,
forward and again in the backward pass; only where one chunk holds everything are they kept instead of made twice.

On a GPU the logits of BF16 weights come out of the product in float32: rounded to BF16 they would err by 2^-9 of their
size, 0.03 at 16, as much as engine and trainer differ by in all else. What is made of a chunk is made in one pass over
it, and up to KEEP_BYTES of probabilities are kept for the backward pass in the weights' dtype, the one in which the
gradient enters its products anyway: that saves the second of four products.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}  # of float32 logits
KEEP_BYTES = 2**31  # of probabilities on a GPU


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose float32 logits fill one chunk; whole tiles of a matrix product where there are many."""
    tokens = max(16, CHUNK_BYTES.get(device.type, 2**28) // (4 * vocabulary))
    return tokens // 128 * 128 if device.type == "cuda" and tokens >= 128 else tokens


def token_logprobs(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | None = None,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """log_softmax(logits / temperature) at `targets`, in nats and float32, and the entropy of that distribution if
    asked for; both differentiable. logits = hidden @ weight.T + bias, softcapped to cap * tanh(logits / cap)."""
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: a log-probability needs a temperature above 0")
    chunk = chunk or chunk_tokens(len(weight), hidden.device)
    if hidden.is_cuda and bias is None and softcap is None:
        gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        logprobs, entropies = _FusedLogprobs.apply(hidden, weight, targets, temperature, entropy, chunk, gradient)
        return logprobs, entropies if entropy else None
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, softcap, entropy, chunk)
    return logprobs, entropies if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, entropy, chunk):
        n = len(hidden)
        ctx.set_materialize_grads(False)
        logprobs = hidden.new_empty(n, dtype=torch.float32)
        normalizers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        keep = None
        table = _float32_table(weight)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            logits, raw = _scaled_logits(hidden[rows], table, bias, temperature, softcap)
            torch.logsumexp(logits, -1, out=normalizers[rows])
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalizers[rows]
            if n <= chunk and any(ctx.needs_input_grad):
                keep = (logits, raw)
            if entropy:
                probabilities = (logits - normalizers[rows, None]).exp_()
                entropies[rows] = normalizers[rows] - torch.linalg.vecdot(probabilities, logits)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, entropies, *(keep or (None, None)))
        ctx.temperature, ctx.softcap, ctx.chunk = temperature, softcap, chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, bias, targets, normalizers, entropies, kept_logits, kept_raw = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        one_chunk = len(hidden) <= ctx.chunk
        # chunks add up in float32; a single chunk needs no sum
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight and not one_chunk else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        table = _float32_table(weight) if kept_logits is None else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            if kept_logits is not None:
                logits, raw = kept_logits, kept_raw
            else:
                logits, raw = _scaled_logits(hidden[rows], table, bias, ctx.temperature, ctx.softcap)
            # d logprob / d logit_j = [j is the target] - p_j;  d entropy / d logit_j = -p_j (log p_j + entropy)
            probabilities = (logits - normalizers[rows, None]).exp_()
            row_factor = -grad_logprobs[rows, None] if grad_logprobs is not None else 0.0
            if grad_entropies is not None and len(entropies):
                log_p_plus_entropy = logits + (entropies[rows] - normalizers[rows])[:, None]
                row_factor = row_factor - grad_entropies[rows, None] * log_p_plus_entropy
            grad = probabilities.mul_(row_factor)
            if grad_logprobs is not None:
                grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            if ctx.temperature != 1.0:
                grad.div_(ctx.temperature)
            if ctx.softcap is not None:
                grad.mul_(1 - (raw / ctx.softcap).tanh_().square_())
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if needs_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if needs_weight and one_chunk:
                grad_weight = grad.T @ hidden
            elif needs_weight:
                grad_weight += grad.T @ hidden[rows]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


class _FusedLogprobs(torch.autograd.Function):
    """The same on a GPU, for logits without bias and softcap."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, chunk, gradient):
        from trainer.model.kernels import triton_head

        n, vocabulary = len(hidden), len(weight)
        ctx.set_materialize_grads(False)
        logprobs = hidden.new_empty(n, dtype=torch.float32)
        normalizers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        fits = n * vocabulary * weight.element_size() <= KEEP_BYTES
        probabilities = weight.new_empty(n, vocabulary) if gradient and fits else None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            triton_head.row_statistics(
                _scaled_logits(hidden[rows], weight, None, 1.0, None)[0],
                targets[rows],
                temperature,
                logprobs[rows],
                normalizers[rows],
                None if entropies is None else entropies[rows],
                None if probabilities is None else probabilities[rows],
            )
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.probabilities, ctx.kept = probabilities, probabilities is not None
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, logprobs.new_empty(0) if entropies is None else entropies

    @staticmethod
    def backward(ctx, d_logprobs, d_entropies):
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        if entropies is None:
            d_entropies = None
        if d_logprobs is None and d_entropies is None:
            return (None,) * 7
        d_logprobs, d_entropies = (d if d is None else d.contiguous() for d in (d_logprobs, d_entropies))
        backward = _from_probabilities if ctx.kept else _from_logits
        grads = backward(ctx, hidden, weight, targets, normalizers, entropies, d_logprobs, d_entropies)
        return *grads, None, None, None, None, None


def _from_probabilities(ctx, hidden, weight, targets, normalizers, entropies, d_logprobs, d_entropies):
    from trainer.model.kernels import triton_head

    grad, ctx.probabilities = ctx.probabilities, None  # becomes the gradient, in place
    if grad is None:
        raise RuntimeError("the head's probabilities were used up by an earlier backward pass: it can run only once")
    triton_head.logits_gradient(grad, grad, targets, ctx.temperature, None, entropies, d_logprobs, d_entropies)
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    return (torch.mm(grad, weight) if needs_hidden else None), (torch.mm(grad.T, hidden) if needs_weight else None)


def _from_logits(ctx, hidden, weight, targets, normalizers, entropies, d_logprobs, d_entropies):
    from trainer.model.kernels import triton_head

    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None  # chunks add up in float32
    buffer = weight.new_empty(min(ctx.chunk, len(hidden)), len(weight))
    for start in range(0, len(hidden), ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        logits = _scaled_logits(hidden[rows], weight, None, 1.0, None)[0]
        grad = buffer[: len(logits)]
        triton_head.logits_gradient(
            logits,
            grad,
            targets[rows],
            ctx.temperature,
            normalizers[rows],
            None if entropies is None else entropies[rows],
            None if d_logprobs is None else d_logprobs[rows],
            None if d_entropies is None else d_entropies[rows],
        )
        del logits
        if needs_hidden:
            torch.mm(grad, weight, out=grad_hidden[rows])
        if needs_weight:
            _add_product(grad_weight, grad.T, hidden[rows])
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in total's float32, whatever a's and b's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _float32_table(weight: Tensor) -> Tensor:
    """`weight` in a form whose product comes out in float32: a GPU multiplies BF16 into float32 by itself, a CPU
    needs the table widened, once for all chunks."""
    return weight if weight.dtype == torch.float32 or weight.is_cuda else weight.float()


def _scaled_logits(hidden, table, bias, temperature, softcap) -> tuple[Tensor, Tensor | None]:
    """float32 logits / temperature [tokens, vocabulary], and the logits before a softcap, which its gradient needs."""
    if table.dtype != torch.float32:
        logits = torch.mm(hidden.to(table.dtype), table.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden.float(), table.T)
    if bias is not None:
        logits += bias.float()
    raw = None
    if softcap is not None:
        raw, logits = logits, (logits / softcap).tanh_().mul_(softcap)
    return (logits.div_(temperature) if temperature != 1.0 else logits), raw
