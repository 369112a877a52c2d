"""The in-process engine: continuous batching over a decoder that lives in this process.

What runs together depends on the order of calls and on nothing else: requests are admitted first come, first served,
as rows become free; no decision reads a clock."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollout.decoder import Decoder
from rollout.engine import FinishReason, Request, Rollout
from rollout.sampler import request_key, sample
from rollout.stop import StopFinder

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 4096  # tokens read in one product at most
_CONTEXT_STEP = 64  # cache rows grow in steps of this many tokens


class EngineUnusable(RuntimeError):
    """The engine is poisoned, asleep or closed."""


@dataclass
class _Running:
    """A request that holds a cache row."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    stop: StopFinder | None = None

    def append(self, token: int, logprob: float, version: int) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1] = (version, self.versions[-1][1] + 1)
        else:
            self.versions.append((version, 1))

    @property
    def context(self) -> np.ndarray:
        return np.array([*self.request.prompt_tokens, *self.tokens], np.int64)


def build_decoder(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str,
    cache: Literal["auto", "latent", "expanded"],
    kernels: Literal["auto", "native", "torch"],
) -> Decoder:
    """The decoder for a Hugging Face folder, with its weights loaded."""
    config_file = Path(path) / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{path} has no config.json: expected a Hugging Face model folder")
    if json.loads(config_file.read_text()).get("model_type") == "deepseek_v3":
        from rollout.decode_native import NativeDecoder
        from rollout.decode_v3 import V3Decoder, latent_is_smaller
        from rollout.transport.disk import read_folder
        from trainer.model.config import V3Config

        config = V3Config.load(path)
        expanded = cache == "expanded" or (cache == "auto" and not latent_is_smaller(config))
        fits = expanded and device == "cpu" and dtype == torch.float32
        if kernels == "native" and not fits:
            raise ValueError(
                f"native kernels compute float32 on a CPU with an expanded cache, asked for were {dtype} on {device} "
                f"with cache {cache!r}: choose kernels='torch' or 'auto'"
            )
        native = kernels != "torch" and fits
        decoder = NativeDecoder(config) if native else V3Decoder(config, dtype=dtype, device=device, cache=cache)
        log.info("%s: V3 decoding with %s kernels, %s cache", path, *_names(native, expanded))
        decoder.load(read_folder(path))
        return decoder
    if kernels == "native":
        raise ValueError(f"native kernels decode DeepSeek-V3 models only, {path} is another one: leave kernels='auto'")
    from rollout.decode_hf import TransformersDecoder

    return TransformersDecoder(path, dtype=dtype, device=device)


def end_tokens(path: str | Path) -> set[int]:
    """Ids that end a sequence: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if found is not None:
            return set(found if isinstance(found, list) else [found])
    return set()


def _names(native: bool, expanded: bool) -> tuple[str, str]:
    return "native" if native else "torch", "expanded" if expanded else "latent"


class TorchEngine:
    """Keeps rollout.engine.Engine for the V3 architecture and for causal LMs that transformers loads.

    `path` is a Hugging Face folder. `max_batch` sequences run at once; `max_context` (default: the model's) bounds
    prompt plus completion; memory for caches is taken as the submitted requests need it. `cache` chooses what V3
    attention keeps (see rollout.decode_v3); `kernels="auto"` computes float32 V3 models with an expanded cache on a CPU
    with the C++ of rollout.native, everything else with torch. `threads` sets torch's for the whole process.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 256,
        max_context: int | None = None,
        version: int = 0,
        cache: Literal["auto", "latent", "expanded"] = "auto",
        kernels: Literal["auto", "native", "torch"] = "auto",
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.version = version
        self.decoder = build_decoder(
            path, dtype=getattr(torch, dtype), device=device, cache=cache, kernels=kernels
        )
        self.max_batch = max_batch
        self.max_context = min(max_context or self.decoder.max_positions, self.decoder.max_positions)
        self.end_tokens = end_tokens(path)
        self.tokenizer = self._load_tokenizer(path)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []  # row r of the decoder belongs to self._running[r]
        self._ended: list[Rollout] = []
        self._keys = np.zeros(max_batch, np.uint64)
        self._unusable: str | None = None
        self._asleep: tempfile.TemporaryDirectory | None = None
        self._reserved = (0, 0, 0)  # rows, context and completion tokens of the decoder's caches

    @staticmethod
    def _load_tokenizer(path: str | Path):
        if not any((Path(path) / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            log.warning("%s has no tokenizer: rollouts will carry no text, stop strings are refused", path)
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)

    # requests

    def submit(self, requests: list[Request]) -> None:
        """Queues requests. Raises ValueError, before it queues any, for one that cannot be served."""
        self._check()
        busy = {r.request.id for r in self._running} | {r.id for r in self._waiting}
        for request in requests:
            self._validate(request)
            if request.id in busy:
                raise ValueError(f"request {request.id} is already running: ids must be unique among unfinished ones")
            busy.add(request.id)
        self._waiting.extend(requests)

    def _validate(self, request: Request) -> None:
        sampling, prompt = request.sampling, request.prompt_tokens
        if not prompt:
            raise ValueError(f"request {request.id} has an empty prompt")
        if len(prompt) >= self.max_context:
            raise ValueError(
                f"the prompt of request {request.id} has {len(prompt)} tokens, the engine's context holds "
                f"{self.max_context} with at least one to write: shorten it or raise max_context"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.decoder.vocab_size:
            raise ValueError(f"the prompt of request {request.id} has ids outside [0, {self.decoder.vocab_size})")
        if sampling.max_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(
                f"request {request.id}: {sampling}: expected max_tokens >= 1, temperature >= 0, top_p in (0, 1] and "
                "top_k >= 0"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"request {request.id} has stop strings, but the model folder has no tokenizer")
        if not sampling.ignore_eos and not self.end_tokens:
            raise ValueError(
                "the model names no eos_token_id in generation_config.json or config.json: set it there, or ask with "
                "ignore_eos"
            )

    def completed(self, timeout_s: float | None = None) -> list[Rollout]:
        self._check()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ended and (self._running or self._waiting):
            self._step()
            if deadline is not None and time.monotonic() >= deadline:
                break
        ended, self._ended = self._ended, []
        return ended

    def interrupt(self) -> list[Rollout]:
        self._check()
        stopped = [self._rollout(r, "interrupted") for r in self._running]
        stopped += [self._rollout(self._begin(r), "interrupted") for r in self._waiting]
        self._running.clear()
        self._waiting.clear()
        return stopped

    # weights

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._asleep is not None:
            raise EngineUnusable("the engine is asleep: call wake() before update()")
        if self._unusable == "closed":
            self._check()
        # From here until everything has arrived the weights may be a mixture.
        self._unusable = f"the update to version {version} did not finish"
        try:
            self.decoder.load(weights)
        except Exception as error:
            self._unusable = f"the update to version {version} failed: {error}"
            raise
        self._unusable = None
        self.version = version

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as the engine holds them, under checkpoint names (to compare fingerprints)."""
        self._check()
        yield from self.decoder.weights()

    def score(self, sequences: list[list[int]], temperature: float = 1.0) -> list[np.ndarray]:
        self._check()
        scores: list[np.ndarray] = []
        for chunk in _chunks([np.asarray(s, np.int64) for s in sequences], _PREFILL_TOKENS):
            logprobs = (self.decoder.logits(chunk) / temperature).log_softmax(-1)  # [tokens of the chunk, vocab]
            start = 0
            for tokens in chunk:
                rows = logprobs[start : start + len(tokens) - 1]
                chosen = rows.gather(1, torch.from_numpy(tokens[1:])[:, None].to(rows.device))[:, 0].cpu().numpy()
                scores.append(np.concatenate([np.zeros(1, np.float32), chosen]))
                start += len(tokens)
        return scores

    # life

    def sleep(self) -> None:
        """Frees weights and caches; the weights wait in a temporary file, unfinished requests keep their tokens."""
        self._check()
        folder = tempfile.TemporaryDirectory(prefix="rlzero-engine-")
        save_file({n: t.detach().cpu().contiguous() for n, t in self.decoder.weights()}, f"{folder.name}/weights")
        self.decoder.release()
        self._reserved = (0, 0, 0)
        self._asleep = folder

    def wake(self) -> None:
        """Loads the weights back and rebuilds the caches of unfinished requests."""
        if self._asleep is None:
            return
        self.decoder.load(load_file(f"{self._asleep.name}/weights").items())
        self._asleep.cleanup()
        self._asleep = None
        if self._running:
            self._reserve(self._running)
            self._read([(r.context[:-1], [row]) for row, r in enumerate(self._running)])

    def close(self) -> None:
        if self._unusable == "closed":
            return
        if self._asleep is not None:
            self._asleep.cleanup()
            self._asleep = None
        self.decoder.release()
        self._running.clear()
        self._waiting.clear()
        self._ended.clear()
        self._unusable = "closed"

    def _check(self) -> None:
        if self._unusable == "closed":
            raise EngineUnusable("the engine is closed")
        if self._unusable:
            raise EngineUnusable(f"{self._unusable}; the engine answers again after a full update")
        if self._asleep is not None:
            raise EngineUnusable("the engine is asleep: call wake() first")

    # one step

    def _step(self) -> None:
        admitted = self._admit()
        if admitted:
            for logits, rows in self._read(admitted):
                self._accept(rows, logits[[i for i, group in enumerate(rows) for _ in group]])
            self._retire()
        if self._running:
            n = len(self._running)
            tokens = np.fromiter((r.tokens[-1] for r in self._running), np.int64, n)
            positions = np.fromiter((len(r.request.prompt_tokens) + len(r.tokens) - 1 for r in self._running), np.int64, n)
            self._accept([[row] for row in range(n)], self.decoder.decode(tokens, positions))
            self._retire()

    def _begin(self, request: Request) -> _Running:
        running = _Running(request)
        if request.partial is not None:
            running.tokens = list(request.partial.tokens)
            running.logprobs = list(request.partial.logprobs)
            running.versions = list(request.partial.versions)
        if request.sampling.stop:
            running.stop = StopFinder(self.tokenizer, request.sampling.stop)
        return running

    def _admit(self) -> list[tuple[np.ndarray, list[int]]]:
        """Gives rows to waiting requests. Returns what has to be read: each distinct context and the rows that share
        it. Only requests admitted together share, so a prefix never outlives the weights that made it."""
        contexts: dict[bytes, tuple[np.ndarray, list[int]]] = {}
        first = len(self._running)
        while self._waiting and len(self._running) < self.max_batch:
            running = self._begin(self._waiting.popleft())
            reason = self._finish(running) if running.tokens else None
            if reason:
                self._ended.append(self._rollout(running, reason))
                continue
            row = len(self._running)
            self._keys[row] = request_key(running.request)
            self._running.append(running)
            context = running.context
            contexts.setdefault(context.tobytes(), (context, []))[1].append(row)
        if contexts:
            self._reserve(self._running[first:])
        return list(contexts.values())

    def _reserve(self, joining: list[_Running]) -> None:
        def up(tokens: int) -> int:
            return min(-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP, self.max_context)

        completion = max(r.request.sampling.max_tokens for r in joining)
        context = max(len(r.request.prompt_tokens) + r.request.sampling.max_tokens for r in joining)
        needed = (len(self._running), up(context), up(completion))
        if any(n > r for n, r in zip(needed, self._reserved, strict=True)):
            self._reserved = tuple(max(pair) for pair in zip(needed, self._reserved, strict=True))
            self.decoder.reserve(*self._reserved)

    def _read(self, contexts: list[tuple[np.ndarray, list[int]]]) -> Iterator[tuple[Tensor, list[list[int]]]]:
        results = []
        start = 0
        for chunk in _chunks([c for c, _ in contexts], _PREFILL_TOKENS):
            rows = [rows for _, rows in contexts[start : start + len(chunk)]]
            results.append((self.decoder.prefill(chunk, rows), rows))
            start += len(chunk)
        return results

    def _accept(self, rows: list[list[int]], logits: Tensor) -> None:
        flat = [row for group in rows for row in group]
        running = [self._running[row] for row in flat]
        counts = np.fromiter((len(r.tokens) for r in running), np.int64, len(running))
        tokens, logprobs = sample(logits, [r.request.sampling for r in running], self._keys[flat], counts)
        for r, token, logprob in zip(running, tokens.tolist(), logprobs.tolist(), strict=True):
            r.append(token, logprob, self.version)

    def _retire(self) -> None:
        """Hands out what ended, in row order, and closes the gaps with the last rows."""
        reasons = [self._finish(r) for r in self._running]
        gone = [row for row, reason in enumerate(reasons) if reason]
        self._ended += [self._rollout(self._running[row], reasons[row]) for row in gone]
        for row in reversed(gone):
            last = len(self._running) - 1
            if row != last:
                self.decoder.move(last, row)
                self._running[row], self._keys[row] = self._running[last], self._keys[last]
            self._running.pop()

    def _finish(self, running: _Running) -> FinishReason | None:
        sampling = running.request.sampling
        if not sampling.ignore_eos and running.tokens[-1] in self.end_tokens:
            return "stop"
        if running.stop is not None and running.stop.found(running.tokens):
            return "stop"
        length = len(running.tokens)
        if length >= sampling.max_tokens or len(running.request.prompt_tokens) + length >= self.max_context:
            return "length"
        return None

    def _rollout(self, running: _Running, reason: FinishReason) -> Rollout:
        text = self.tokenizer.decode(running.tokens, skip_special_tokens=True) if self.tokenizer else ""
        request = running.request
        return Rollout(
            prompt_id=request.prompt_id,
            sample=request.sample,
            prompt_tokens=request.prompt_tokens,
            tokens=running.tokens,
            logprobs=running.logprobs,
            versions=running.versions,
            finish_reason=reason,
            text=text,
        )


def _chunks(sequences: list[np.ndarray], budget: int) -> Iterator[list[np.ndarray]]:
    """Runs of consecutive sequences of at most `budget` tokens (a longer one alone)."""
    chunk: list[np.ndarray] = []
    size = 0
    for sequence in sequences:
        if chunk and size + len(sequence) > budget:
            yield chunk
            chunk, size = [], 0
        chunk.append(sequence)
        size += len(sequence)
    if chunk:
        yield chunk
