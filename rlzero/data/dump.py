"""Scored groups of one step as a JSON-lines file, which `rlzero generate` writes and `rlzero train --from-dump` reads.

The first line says what the file is; every further line is one group with all that the trainer will see of it. Floats
are written with the digits that give the same float back.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rewards.json_form import dumps
from rewards.score import Score
from rlzero.config.read import UsageError
from rlzero.config.rl import Reward
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout

KIND = "rlzero dump 1"


@contextmanager
def writing(path: str | Path, rewards: Sequence[Reward] = (), **about: Any) -> Iterator[Callable[[Group], None]]:
    """A function that writes one group at a time; each is in the file when it returns. The `rewards` that scored the
    groups and `about` (step, policy, ...) go into the first line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:

        def write(values: dict[str, Any]) -> None:
            file.write(dumps(values) + "\n")
            file.flush()

        weights = [{"fn": reward.fn, "weight": reward.weight} for reward in rewards]
        write({"kind": KIND, "rewards": weights, **about})
        yield lambda group: write(_to_json(group))


def save(path: str | Path, groups: Sequence[Group], rewards: Sequence[Reward] = (), **about: Any) -> None:
    """Writes all `groups`, see `writing`."""
    with writing(path, rewards, **about) as write:
        for group in groups:
            write(group)


def load(path: str | Path) -> list[Group]:
    """The groups that `save` wrote. Raises `UsageError` with file and line for anything else."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        kind = json.loads(lines[0])["kind"]
    except (IndexError, ValueError, KeyError, TypeError):
        kind = None
    if kind != KIND:
        raise UsageError(
            f"{path}: not a dump of this release (expected a first line with kind '{KIND}', found {kind!r})"
        )
    groups = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            groups.append(_from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}:{number}: not a group of a dump: {type(error).__name__}: {error}") from error
    if not groups:
        raise UsageError(f"{path}: the dump has no groups")
    return groups


def load_rewards(path: str | Path) -> tuple[Reward, ...]:
    """Address and weight of the rewards that scored the groups of a dump, in the order of their scores. Raises
    `UsageError` where the dump does not say."""
    with Path(path).open(encoding="utf-8") as file:
        rewards = json.loads(file.readline()).get("rewards")
    if not rewards:
        raise UsageError(
            f"{path}: does not name the rewards that scored it, so what is correct is not known (an older release "
            "wrote it); make the dump again, or take all completions with data.keep=all"
        )
    return tuple(Reward(**reward) for reward in rewards)


def _to_json(group: Group) -> dict[str, Any]:
    rollouts = []
    for rollout in group.rollouts:
        fields = {**vars(rollout), "routed_experts": None}
        if rollout.routed_experts is not None:
            routed = np.ascontiguousarray(rollout.routed_experts, dtype=np.int16)
            fields["routed_experts"] = {"shape": routed.shape, "int16": base64.b64encode(routed.tobytes()).decode()}
        rollouts.append(fields)
    scores = [[None if score is None else vars(score) for score in of_sample] for of_sample in group.scores]
    return {"prompt": vars(group.prompt), "rollouts": rollouts, "scores": scores}


def _from_json(values: dict[str, Any]) -> Group:
    rollouts = []
    for fields in values["rollouts"]:
        routed = fields.pop("routed_experts")
        array = None
        if routed is not None:
            array = np.frombuffer(base64.b64decode(routed["int16"]), np.int16).reshape(routed["shape"]).copy()
        versions = [tuple(pair) for pair in fields.pop("versions")]
        tokens = tuple(fields.pop("prompt_tokens"))
        drafts = tuple(fields.pop("drafts", (0, 0, 0)))
        rollouts.append(
            Rollout(**fields, prompt_tokens=tokens, versions=versions, routed_experts=array, drafts=drafts)
        )
    prompt = values["prompt"]
    scores = [[_score(score) for score in of_sample] for of_sample in values["scores"]]
    return Group(Prompt(**{**prompt, "tokens": tuple(prompt["tokens"])}), rollouts, scores)


def _score(fields: dict[str, Any] | None) -> Score | None:
    """JSON has no NaN, which is the value of a score that is an error."""
    return fields if fields is None else Score(**{**fields, "value": math.nan if (v := fields["value"]) is None else v})
