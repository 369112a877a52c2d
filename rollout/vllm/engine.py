"""vLLM as a rollout engine. What touches vLLM's internals stands in the files rollout/vllm_*.py and nowhere else.

Releases 0.25.1 (the one for CUDA and torch 2.11) to 0.32.0 are accepted, others refused. The contract tests run on
the CPU build of 0.32.0; 0.25.1 was run on H100s (benchmarks/RESULTS.md). The engine core runs in this process (no
second Python process, nothing to clean up after a crash; tensor parallel workers are the exception), steps are driven
by `completed`, and scheduling is synchronous, so that the tokens of a step belong to exactly one policy version. vLLM
changes process-wide state (environment, `torch.set_num_threads`, the global seed): give the engine a process of its
own, as `rollout.worker` does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.engine import EngineUnusable, Request, Rollout
from rollout.tokenizer import completion_text, folder_tokenizer
from rollout.transport.base import CorruptWeights, WeightUpdate
from rollout.transport.expected_weights import ExpectedWeights
from rollout.transport.payload import engine_payload
from rollout.vllm.draft import Drafts, keep_temperature_of_drafts
from rollout.vllm.install import Answer, Installed, install, keep_installer
from rollout.vllm.records import all_positions, continued, prompt_logprobs, request_seed, sampled_logprobs
from rollout.vllm.sampling import draw_together, keep_noise_of_unread_prompts
from rollout.vllm.serving import check_serving, drafts_from_policy
from rollout.vllm.start import (
    ENVIRONMENT,
    check_names,
    check_release,
    context_limit,
    held_rotation,
    installed_release,
    on_cpu,
)
from trainer.checkpoint.model_folder import read_config, refusal, text_end
from trainer.model.v3_config import FP8_BLOCKS

# ---- a function that runs inside a vLLM worker; others are in rollout.vllm.install ----


def _set_score_temperature(worker: Any, temperature: float) -> None:
    """Makes prompt log-probabilities those of softmax(logits / temperature). vLLM computes them at temperature 1
    whatever the request says. Sampled tokens take another path."""
    keep_temperature_of_drafts(worker.model_runner, temperature)
    sampler = worker.model_runner.sampler
    sampler.__dict__.pop("compute_logprobs", None)
    if temperature != 1.0:
        sampler.compute_logprobs = lambda logits: (logits.float() / temperature).log_softmax(-1)


# ---- the engine ----


@dataclass
class _Running:
    request: Request
    key: str  # vLLM's own id of the request
    segments: list[tuple[int, int]] = field(default_factory=list)  # closed ones, of this run of the request


class VLLMEngine:
    """Keeps `rollout.engine.Engine`.

    `path` is a Hugging Face folder; `dtype` the weights' and activations' type; `max_context` the most tokens of prompt
    and completion together (default: the model's own limit); `max_batch` the most requests in one step; `sleep_level`
    what `sleep` frees on a GPU (0: the engine never sleeps, 1: KV cache freed and weights kept in host memory, 2: both
    dropped, so that an update must follow `wake`); `engine_args` goes to vLLM's EngineArgs. There, `quantization: fp8`
    is block-FP8 as DeepSeek releases it; where the folder holds other weights the engine does not read them and refuses
    every call until the first update.

    Log-probabilities are those of the distribution that was sampled from: log_softmax(logits / temperature), after
    top-p and top-k where they are on; at temperature 0 (greedy) those at temperature 1.

    With speculative decoding (`engine_args: speculative_config`) they are the served model's, at the same temperature,
    and so is the distribution that tokens are drawn from, whatever the draft.

    A continued rollout keeps its tokens and their log-probabilities; they are read again as part of the prompt.
    """

    speculates_on_cpu = False  # vLLM's CPU build computes nonsense, see tests/rollout/cpu_speculation.py

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "bfloat16",
        seed: int = 0,
        max_context: int | None = None,
        max_batch: int = 256,
        threads: int | None = None,
        return_routed_experts: bool = False,
        sleep_level: int = 0,
        version: int = 0,
        engine_args: dict[str, Any] | None = None,
    ):
        release = installed_release()
        check_release(release)
        if threads is not None:
            torch.set_num_threads(threads)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        folder = Path(path)
        arguments = dict(engine_args or {})
        check_names(arguments, [f.name for f in fields(EngineArgs)], release)
        self.on_cpu = current_platform.is_cpu()
        if why := refusal(folder, "vllm"):
            raise ValueError(f"{folder}: {why}")
        model = read_config(folder)
        check_serving(arguments, model, os.environ, speculates_here=self.speculates_on_cpu or not self.on_cpu)
        if return_routed_experts and self.on_cpu:
            raise ValueError("vLLM's CPU build cannot return routed experts; leave return_routed_experts off there")
        self.version, self.max_batch = version, max_batch
        self.sleep_level = sleep_level
        self.max_context = context_limit(folder, max_context)
        payload = engine_payload(folder, arguments)
        self._expected = ExpectedWeights(folder, payload, prediction=drafts_from_policy(arguments))
        self._unusable: str | None = None
        if payload == "fp8" and "quantization_config" not in model:
            overrides = {"quantization_config": FP8_BLOCKS, **arguments.get("hf_overrides", {})}
            arguments |= {"hf_overrides": overrides, "load_format": "dummy"}
            self._unusable = _NO_WEIGHTS
        self._dense_layers = model.get("first_k_dense_replace") or 0
        self._tokenizer = folder_tokenizer(folder)
        self.end_tokens = text_end(folder, self._tokenizer).ids
        if held := held_rotation(model, self.max_context):
            arguments["hf_overrides"] = {**held, **arguments.get("hf_overrides", {})}
        arguments |= dict(
            model=str(folder),
            dtype=dtype,
            seed=seed % (1 << 31),
            max_model_len=self.max_context + 1,
            max_num_seqs=max_batch,
            logprobs_mode="processed_logprobs",
            async_scheduling=False,
            enable_sleep_mode=sleep_level > 0 and not self.on_cpu,
            enable_return_routed_experts=return_routed_experts,
            skip_tokenizer_init=self._tokenizer is None,
            trust_remote_code=False,
        )
        arguments.setdefault("disable_log_stats", True)
        if self.on_cpu:
            arguments = on_cpu(arguments)
        self._vllm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        if self.on_cpu:
            self._vllm.engine_core.collective_rpc(keep_noise_of_unread_prompts)
        else:
            draw_together(self._vllm.engine_core.collective_rpc)
        speculates = arguments.get("speculative_config")
        self._drafts = Drafts(self._vllm.engine_core.engine_core.scheduler) if speculates else None
        self._running: dict[str, _Running] = {}
        self._held: list[Request] = []  # unfinished ones while the engine sleeps
        self._ended: list[Rollout] = []
        self._scored: dict[str, np.ndarray] = {}
        self._closed = False
        self.installed: Installed | None = None  # how the last update came in
        self._updates = 0
        self._vllm.engine_core.collective_rpc(keep_installer, args=(self._expected,))

    # -- requests --

    def submit(self, requests: list[Request]) -> None:
        """Queues the requests. All are checked before the first is queued; a ValueError leaves the engine as it was."""
        self._check_usable()
        ids: set[str] = set(self._running)
        for request in requests:
            self._check_request(request)
            if request.id in ids:
                raise ValueError(f"request {request.id} is being written already")
            ids.add(request.id)
        for request in requests:
            kept = request.partial
            if kept is not None and len(kept.tokens) >= self._most_tokens(request):
                self._ended.append(continued(kept, [], [], [], "length", kept.text, kept.routed_experts))
            else:
                self._start(request)

    def _most_tokens(self, request: Request) -> int:
        return min(request.sampling.max_tokens, self.max_context - len(request.prompt_tokens))

    def _check_request(self, request: Request) -> None:
        sampling, kept = request.sampling, request.partial
        if not request.prompt_tokens:
            raise ValueError(f"request {request.id} has an empty prompt; a prompt needs at least one token")
        if sampling.max_tokens < 1:
            raise ValueError(f"request {request.id} asks for max_tokens={sampling.max_tokens}; at least 1 is needed")
        if len(request.prompt_tokens) >= self.max_context:
            raise ValueError(
                f"the prompt of request {request.id} has {len(request.prompt_tokens)} tokens, the engine's context "
                f"holds {self.max_context} with at least one to write: shorten it or raise max_context"
            )
        if sampling.stop and self._tokenizer is None:
            raise ValueError(f"request {request.id} has stop strings, but the model's folder holds no tokenizer")
        if not sampling.ignore_eos and not self.end_tokens:
            raise ValueError(
                "nothing names a token that ends a text: set eos_token_id in generation_config.json, or ask with "
                "ignore_eos"
            )
        if kept is not None and kept.finish_reason != "interrupted":
            raise ValueError(f"request {request.id} continues a rollout that ended with {kept.finish_reason!r}")

    def _start(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, kept = request.sampling, request.partial
        start = len(kept.tokens) if kept else 0
        params = SamplingParams(
            max_tokens=self._most_tokens(request) - start,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=list(sampling.stop) or None,
            skip_special_tokens=False,  # a stop string may be a special token
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=None if sampling.ignore_eos else list(self.end_tokens),
            seed=request_seed(sampling.seed, request.prompt_id, request.sample, start),
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            detokenize=bool(sampling.stop),  # only stop strings need the text while it is written
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = [*request.prompt_tokens, *(kept.tokens if kept else ())]
        # The salt keeps a new request from reading prefixes that other weights cached.
        prompt = {"prompt_token_ids": tokens, "cache_salt": f"update {self._updates}, version {self.version}"}
        key = self._vllm.add_request(request.id, prompt, params)
        if kept and sampling.stop:
            # A stop string may begin in the kept text. All but its last character can stand there.
            text = self._tokenizer.decode(kept.tokens, skip_special_tokens=False)
            state = self._vllm.output_processor.request_states[key]
            state.detokenizer.output_text = text[max(len(text) - max(map(len, sampling.stop)) + 1, 0) :]
        self._running[request.id] = _Running(request, key)

    def completed(self, timeout_s: float | None = None) -> list[Rollout]:
        """Rollouts that ended since the last call, see `Engine.completed`. Steps are never cut: the call may exceed
        `timeout_s` by one step."""
        self._check_usable()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ended and self._running:
            self._step()
            if deadline is not None and time.monotonic() >= deadline:
                break
        ended, self._ended = self._ended, []
        return ended

    def interrupt(self, only: Collection[str] | None = None) -> list[Rollout]:
        """Stops unfinished requests, see `Engine.interrupt`. Finished ones stay for `completed`. Routing of an
        interrupted rollout is dropped: its continuation returns that of all tokens."""
        self._check_usable()
        stopped = []
        asked = {key: running for key, running in self._running.items() if only is None or key in only}
        for running in asked.values():
            state = self._vllm.output_processor.request_states[running.key]
            tokens = list(state.detokenizer.output_token_ids)
            logprobs = sampled_logprobs(state.logprobs_processor.logprobs, tokens, running.request.id)
            stopped.append(self._rollout(running, tokens, logprobs, "interrupted", None))
        self._vllm.abort_request([running.key for running in asked.values()], internal=True)
        for key in asked:
            del self._running[key]
        return stopped

    def _step(self) -> None:
        for output in self._vllm.step():
            if not output.finished:
                continue
            if output.request_id in self._scored:
                self._scored[output.request_id] = prompt_logprobs(output.prompt_logprobs, output.prompt_token_ids)
                continue
            running = self._running.pop(output.request_id)
            written = output.outputs[0]
            if written.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended request {output.request_id} with {written.finish_reason!r}")
            tokens = list(written.token_ids)
            logprobs = sampled_logprobs(written.logprobs, tokens, output.request_id)
            self._ended.append(self._rollout(running, tokens, logprobs, written.finish_reason, written.routed_experts))

    def _rollout(
        self,
        running: _Running,
        tokens: list[int],
        logprobs: list[float],
        finish_reason: Any,
        routed: np.ndarray | None,
    ) -> Rollout:
        request, kept = running.request, running.request.partial
        base = kept or Rollout(request.prompt_id, request.sample, request.prompt_tokens, [], [], [], "interrupted", "")
        counted = sum(n for _, n in running.segments)
        segments = [*running.segments, (self.version, len(tokens) - counted)]
        ends = self.end_tokens if finish_reason == "stop" and not request.sampling.ignore_eos else ()
        text = completion_text(self._tokenizer, [*base.tokens, *tokens], ends)
        if routed is not None:
            total = len(request.prompt_tokens) + len(base.tokens) + len(tokens)
            routed = all_positions(routed, total, self._dense_layers)
        drafts = self._drafts.take(running.key) if self._drafts else (0, 0, 0)
        return continued(base, tokens, logprobs, segments, finish_reason, text, routed, drafts)

    # -- weights --

    def update(self, weights: WeightUpdate | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Installs a complete set of checkpoint tensors and takes `version`. Every worker of vLLM receives an update by
        itself. Raises EngineUnusable, from the cause, when the set is incomplete, damaged or does not fit; the engine
        then refuses every call until an update succeeds."""
        if self._closed:
            raise EngineUnusable("the engine is closed")
        if self._unusable == _ASLEEP:
            raise EngineUnusable(_ASLEEP)
        unread = []
        for running in self._running.values():
            written = self._vllm.output_processor.request_states[running.key].detokenizer.num_output_tokens()
            running.segments.append((self.version, written - sum(n for _, n in running.segments)))
            if not written:
                unread.append(running)
        # Those that wait their turn carry the salt of the old weights, and would read prefixes that these cached.
        self._vllm.abort_request([running.key for running in unread], internal=True)
        self._held += [self._running.pop(running.request.id).request for running in unread]
        self._unusable = f"the update to version {version} did not finish"
        try:
            self.installed = self._install(weights)
        except BaseException as error:
            self._unusable = (
                f"the update to version {version} failed and may have left weights of two versions ({error}); "
                "the engine answers nothing until a full update succeeds"
            )
            raise EngineUnusable(self._unusable) from error
        self._unusable = None
        self.version = version
        self._updates += 1
        self._resume()

    def _install(self, weights: WeightUpdate | Iterable[tuple[str, Tensor]]) -> Installed:
        apart = self._vllm.vllm_config.parallel_config.world_size > 1  # workers are processes of their own
        source = list(weights) if apart and not isinstance(weights, WeightUpdate) else weights
        try:
            answers: list[Answer] = self._vllm.engine_core.collective_rpc(install, args=(source,))
        except Exception as error:
            raise RuntimeError(
                f"vLLM's workers gave no answer ({error}): where one has died, start the engine again"
            ) from error
        failed = [f"worker {n}: {answer.error}" for n, answer in enumerate(answers) if answer.error is not None]
        if failed:
            kind = CorruptWeights if any(answer.corrupt for answer in answers) else RuntimeError
            raise kind("; ".join(failed))
        return Installed.by_all([answer.installed for answer in answers])

    def score(self, sequences: list[list[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probability of every token given those before it, float32 [len(sequence)] each; entry 0 is 0.0. Running
        requests go on meanwhile. vLLM holds the logits of all tokens of a step: for long sequences of a large
        vocabulary lower `max_num_batched_tokens` in engine_args."""
        from vllm import SamplingParams

        self._check_usable()
        if temperature <= 0:
            raise ValueError(f"score was asked for temperature {temperature}; it must be above 0")
        if temperature != 1.0 and any(r.request.sampling.temperature == 0 for r in self._running.values()):
            raise RuntimeError("scoring at a temperature other than 1 would change greedy requests being written")
        longest = max((len(s) for s in sequences), default=0)
        if longest > self.max_context:
            raise ValueError(f"a sequence of {longest} tokens exceeds the engine's context of {self.max_context}")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, temperature=0, detokenize=False)
        names = [f"score\n{i}" for i in range(len(sequences))]
        pending = {name: s for name, s in zip(names, sequences, strict=True) if len(s) > 1}
        core = self._vllm.engine_core
        core.collective_rpc(_set_score_temperature, args=(temperature,))
        try:
            self._scored = dict.fromkeys(pending)
            for name, sequence in pending.items():
                self._vllm.add_request(name, {"prompt_token_ids": list(sequence)}, params)
            while any(value is None for value in self._scored.values()):
                self._step()
            return [self._scored.get(n, np.zeros(len(s), np.float32)) for n, s in zip(names, sequences, strict=True)]
        finally:
            if unanswered := [name for name, value in self._scored.items() if value is None]:
                self._vllm.abort_request(unanswered)
            self._scored = {}
            core.collective_rpc(_set_score_temperature, args=(1.0,))

    # -- memory and life --

    def sleep(self) -> None:
        """Frees GPU memory as `sleep_level` says; on a CPU, where there is none to free, the engine only stops
        answering. Unfinished requests keep their tokens and go on after `wake`."""
        self._check_usable()
        if self.sleep_level == 0 and not self.on_cpu:
            raise RuntimeError("the engine was started with sleep_level 0; start it with 1 or 2 to let it sleep")
        requests = [running.request for running in self._running.values()]
        self._held = [replace(r, partial=kept) for r, kept in zip(requests, self.interrupt(), strict=True)]
        if not self.on_cpu:
            self._vllm.sleep(level=self.sleep_level)
        self._unusable = _ASLEEP

    def wake(self) -> None:
        """Undoes `sleep`. After level 2 the engine has no weights and refuses every call until an update."""
        if self._closed or self._unusable != _ASLEEP:
            if self._closed or self._unusable != _NO_WEIGHTS:  # which is awake, and an update away from work
                self._check_usable()
            return
        if not self.on_cpu:
            self._vllm.wake_up()
            if self.sleep_level == 2:
                self._unusable = "the weights were dropped by sleep level 2; update() first"
                return
        self._unusable = None
        self._resume()

    def _resume(self) -> None:
        held, self._held = self._held, []
        for request in held:
            self._start(request)

    def close(self) -> None:
        """Ends vLLM and its workers and frees its memory. May be called twice; every other call raises from then on."""
        if self._closed:
            return
        self._closed = True
        self._running.clear()
        self._vllm.engine_core.shutdown()
        del self._vllm
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineUnusable("the engine is closed")
        if self._unusable is not None:
            raise EngineUnusable(self._unusable)


_ASLEEP = "the engine sleeps; wake() it first"
_NO_WEIGHTS = "the engine was started without weights (quantization: fp8); update() first"
