"""Rewards written for TRL or verl, as rewards of a run: `{fn: "rewards.adapters:trl", params: {fn: "./mine.py:f"}}`.

Both are called when rewards are loaded and return the reward; parameters that they do not name go to the function.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rewards.load import ASYNC_TIMEOUT_S, TIMEOUT_S, RewardError, RewardSpec, load_function, to_score


def metric_address(spec: RewardSpec | Any) -> str:
    """The address that people know a reward by: the adapted function's, or its own."""
    return spec.params.get("fn", spec.fn) if spec.fn.startswith("rewards.adapters:") else spec.fn


def trl(fn: str, prompt_column: str = "prompt", conversational: bool | None = None, **params: Any) -> Callable:
    """The reward at `fn` with TRL's signature: `f(completions, prompts, **columns) -> list[float | None]`, or async.

    Every column arrives as a list with one entry per completion. A completion is a text, or a list of one message
    where the prompt is a list of messages (`conversational` overrides that). None and NaN do not apply. `log_metric`
    writes metrics, `log_extra` the detail. Token ids and a trainer are not there: RewardError at loading for a function
    that requires `completion_ids`, `trainer_state` or `environments`.
    """
    function = load_function(fn)
    missing = [n for n in ("completion_ids", "trainer_state", "environments") if _requires(function, n)]
    if missing:
        raise RewardError(f"{fn} requires {missing}, which TRL's trainer passes and a reward here does not get")

    def reward(completions: list[str], **row: Any) -> Any:
        prompt, count = row.pop(prompt_column, None), len(completions)
        messages = isinstance(prompt, list) if conversational is None else conversational
        metrics, extra = {}, {}
        values = function(
            prompts=[prompt] * count,
            completions=[[{"role": "assistant", "content": c}] for c in completions] if messages else completions,
            log_metric=metrics.__setitem__,
            log_extra=extra.__setitem__,
            **{name: [value] * count for name, value in row.items()},
            **params,
        )
        if inspect.isawaitable(values):
            return _awaited(values, finish, metrics, extra)
        return finish(values, metrics, extra)

    def finish(values: Any, metrics: dict[str, Any], extra: dict[str, Any]) -> list[Any]:
        scores = []
        for at, value in enumerate(values.tolist() if hasattr(values, "tolist") else values):
            score = to_score(None if value != value else value, fn)
            detail = ", ".join(f"{name}: {column[at]}" for name, column in extra.items())
            scores.append(score and dataclasses.replace(score, metrics=dict(metrics), detail=detail))
        return scores

    reward.timeout_s = ASYNC_TIMEOUT_S if inspect.iscoroutinefunction(function) else TIMEOUT_S
    return _known_as(reward, function)


def verl(fn: str, **params: Any) -> Callable:
    """The reward at `fn` with verl's signature: `compute_score(data_source, solution_str, ground_truth, extra_info)`,
    or async, which returns a number or a dict with `score`.

    `ground_truth` is the row's `reward_model.ground_truth`, else its column `ground_truth`, else `answer`;
    `data_source` and `extra_info` are columns. Other numbers of the dict become metrics, texts the detail, and its
    `acc` the verdict.
    """
    function = load_function(fn)
    optional = [n for n in ("data_source", "extra_info") if _requires(function, n) is not None]

    def arguments(completion: str, row: Mapping[str, Any]) -> dict[str, Any]:
        found = {"data_source": row.get("data_source", ""), "extra_info": row.get("extra_info") or {}}
        truths = [row.get("reward_model") or {}, row, {"ground_truth": row["answer"]} if "answer" in row else {}]
        truth = next((place["ground_truth"] for place in truths if "ground_truth" in place), None)
        if truth is None:
            wanted = "reward_model.ground_truth, ground_truth or answer"
            raise RewardError(f"{fn} needs {wanted}; the row has {sorted(row)}")
        return {"solution_str": completion, "ground_truth": truth, **{n: found[n] for n in optional}, **params}

    def finish(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "score" not in value:
            raise RewardError(f"{fn} returned a dict with {sorted(value)}; verl's has 'score'")
        rest = {name: entry for name, entry in value.items() if name != "score" and entry is not None}
        texts = {n: e for n, e in rest.items() if not (hasattr(e, "item") or isinstance(e, int | float))}
        score = to_score(value["score"], fn)
        verdict = "correct" if value.get("acc", score.value) > 0 else "wrong"
        metrics = {name: entry for name, entry in rest.items() if name not in texts}
        detail = ", ".join(f"{name}: {text}" for name, text in texts.items())
        return dataclasses.replace(score, verdict=verdict, metrics=metrics, detail=detail)

    async def reward_async(completion: str, **row: Any) -> Any:
        return finish(await function(**arguments(completion, row)))

    def reward(completion: str, **row: Any) -> Any:
        return finish(function(**arguments(completion, row)))

    return _known_as(reward_async if inspect.iscoroutinefunction(function) else reward, function)


def _requires(function: Callable, name: str) -> bool | None:
    """Whether `function` cannot be called without the argument `name`; None where it does not take it at all."""
    parameters = inspect.signature(function).parameters
    if name not in parameters:
        return False if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else None
    return parameters[name].default is inspect.Parameter.empty


async def _awaited(values: Any, finish: Callable, *arguments: Any) -> Any:
    return finish(await values, *arguments)


def _known_as(reward: Callable, function: Callable) -> Callable:
    """`reward` with what the rewards of a run may carry as attributes, from `function`."""
    for name in ("warm", "timeout_s"):
        if hasattr(function, name):
            setattr(reward, name, getattr(function, name))
    return reward


trl.makes_reward = verl.makes_reward = True
