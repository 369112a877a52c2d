"""Puts a benchmark's questions to a model and its answers to the checkers; outcomes go into a store as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rewards.workers.runner import RewardRunner
from rlzero.cluster.engines import EnginePool
from rlzero.eval import statistics
from rlzero.eval.evaluate import answer_of
from rlzero.eval.store import Sample, Store
from rlzero.eval.tasks.task import Question, Task
from rollout.engine import Request, Sampling

# Checkers of form that stand beside a task's own and only fill columns.
COLUMNS = {"format": "rewards.format:format_reward", "language": "rewards.language:language_reward"}
WAITING = 256  # requests that an endpoint has at a time
MOST_FAILED = 0.05  # share of an endpoint's requests that may fail before the evaluation stops

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answer:
    """A completion as it came; `finish` is `failed` where the request did, with the cause in `text`."""

    question: str
    sample: int
    text: str
    tokens: int
    finish: str


class Model(Protocol):
    """Answers requests in any order."""

    def answers(self, wanted: Sequence[tuple[Question, int]]) -> AsyncIterator[Answer]: ...


class EngineModel:
    """The engines of a run. The noise of a sample is keyed by question and number, so that an evaluation which was cut
    off goes on with what it would have drawn."""

    def __init__(self, pool: EnginePool, tokens: Callable[[str], tuple[int, ...]], sampling: Sampling):
        self._pool, self._tokens, self._sampling = pool, tokens, sampling

    async def answers(self, wanted: Sequence[tuple[Question, int]]) -> AsyncIterator[Answer]:
        groups: dict[str, list[Request]] = {}
        for question, sample in wanted:
            request = Request(question.id, sample, self._tokens(question.prompt), self._sampling)
            groups.setdefault(question.id, []).append(request)
        await self._pool.submit(list(groups.values()))
        while self._pool.busy:
            for r in await self._pool.completed():
                yield Answer(r.prompt_id, r.sample, r.text, len(r.tokens), r.finish_reason)


class Endpoint:
    """A server of OpenAI's chat interface. Requests that fail for a while are tried again; what fails for good is
    missing, never wrong, and above `MOST_FAILED` of them the evaluation stops with the cause."""

    def __init__(self, url: str, model: str, sampling: Sampling, key: str = "none", timeout_s: float = 3600.0):
        import openai

        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=5)
        self._model, self._sampling, self._errors = model, sampling, (openai.OpenAIError, ValueError)

    async def answers(self, wanted: Sequence[tuple[Question, int]]) -> AsyncIterator[Answer]:
        places = asyncio.Semaphore(WAITING)

        async def ask(question: Question, sample: int) -> Answer:
            async with places:
                try:
                    return await self._ask(question, sample)
                except self._errors as error:
                    return Answer(question.id, sample, f"{type(error).__name__}: {error}", 0, "failed")

        tasks = [asyncio.create_task(ask(*each)) for each in wanted]
        failed = 0
        try:
            for done, task in enumerate(asyncio.as_completed(tasks), start=1):
                answer = await task
                failed += answer.finish == "failed"
                if failed > max(3, MOST_FAILED * len(wanted)):
                    raise EndpointError(f"{failed} of {done} requests failed, the last: {answer.text}")
                yield answer
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, question: Question, sample: int) -> Answer:
        s = self._sampling
        reply = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": question.prompt}],
            temperature=s.temperature,
            top_p=s.top_p,
            max_tokens=s.max_tokens,
            seed=s.seed + sample,
        )
        if not reply.choices:
            raise ValueError("the endpoint answered without a choice")
        choice = reply.choices[0]
        # Servers that part the thoughts from the answer: rewards read them as one text again.
        thought = getattr(choice.message, "reasoning_content", None)
        text = (f"<think>{thought}</think>" if thought else "") + (choice.message.content or "")
        tokens = reply.usage.completion_tokens if reply.usage else 0
        return Answer(question.id, sample, text, tokens, choice.finish_reason or "stop")


class EndpointError(Exception):
    """Too many requests to an endpoint failed."""


async def ask(
    task: Task,
    questions: Sequence[Question],
    samples: int,
    model: Model,
    store: Store,
    workers: int,
    progress: Progress,
) -> None:
    """Fills `store` with what it lacks of `samples` answers to every question of `task`. `progress` gets how many are
    there, how many there will be, and pass@1 so far with its interval. Raises RewardError where the checkers cannot
    run, and what `model` raises."""
    by_id = {question.id: question for question in questions}
    wanted = [(q, i) for i in range(samples) for q in questions if (task.name, q.id, i) not in store.done]
    specs: list[dict[str, Any]] = [{"fn": task.reward, "timeout_s": task.timeout_s, "params": task.params}]
    specs += [{"fn": address} for address in COLUMNS.values()]
    running = _Running(len(questions) * samples, len(wanted), progress)
    if not wanted:
        return
    with RewardRunner(specs, workers=workers, max_error_share=1.0) as rewards:
        unscored: dict[tuple[str, int], Answer] = {}
        arrived = asyncio.Event()
        finished = False

        async def score() -> None:
            while not finished or unscored:
                if not unscored:
                    arrived.clear()
                    await arrived.wait()
                for key, scores in await asyncio.to_thread(rewards.completed, 1.0):
                    sample = _sample(task, unscored.pop(key), [of_reward[0] for of_reward in scores])
                    store.add(sample)
                    running.add(sample)

        scoring = asyncio.create_task(score())
        try:
            async for answer in model.answers(wanted):
                if answer.finish == "failed":
                    where = (task.name, answer.question, answer.sample)
                    store.add(Sample(*where, "", 0, "failed", None, detail=answer.text))
                    continue
                key = (answer.question, answer.sample)
                unscored[key] = answer
                arrived.set()
                await asyncio.to_thread(rewards.submit, key, [answer.text], by_id[answer.question].columns)
                if scoring.done():
                    break
            finished = True
            arrived.set()
            await scoring
        finally:
            scoring.cancel()


class _Running:
    """pass@1 of what came so far, for the progress bar."""

    def __init__(self, total: int, missing: int, progress: Progress):
        self._total, self._done, self._progress = total, total - missing, progress
        self._counts: dict[str, list[int]] = {}

    def add(self, sample: Sample) -> None:
        self._done += 1
        if sample.correct is not None:
            counts = self._counts.setdefault(sample.question, [0, 0])
            counts[0] += sample.correct
            counts[1] += 1
        said = ""
        if self._counts:
            found = statistics.mean_interval([c / n for c, n in self._counts.values()])
            said = f"pass@1 {found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"
        self._progress(self._done, self._total, said)


def _sample(task: Task, answer: Answer, scores: Sequence[Any]) -> Sample:
    own, others = scores[0], scores[1:]
    columns = {
        name: score.value
        for name, score in zip(COLUMNS, others, strict=True)
        if score is not None and score.verdict not in ("error", "timeout")
    }
    votes = answer_of(answer.text) if task.votes and own.verdict in ("correct", "wrong") else None
    return Sample(
        task.name, answer.question, answer.sample, answer.text, answer.tokens, answer.finish, own.verdict,
        None if own.verdict == "error" else own.value, votes and _canonical(votes), own.detail, columns,
    )  # fmt: skip


def _canonical(answer: str) -> str:
    """An answer in the mathematics checker's spelling: equal numbers and spellings are one candidate for a vote."""
    from rewards.math.rational import rational

    from rewards.math.normal import Unreadable, normalise

    try:
        spelled = normalise(answer)
        number = rational(spelled)
    except Unreadable:
        return answer
    return spelled if number is None else str(number)
