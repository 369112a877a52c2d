"""Says, at step 0 and in `rlzero eval`, that nothing can be learned from the completions, why, and what to change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.load import load_reward
from rlzero.config.rl import Config
from rlzero.eval.evaluate import deciding, is_correct
from rlzero.rl.groups import Group

NEARLY_ALL = 0.9  # of the completions; a base that can learn is right, or at least readable, more often
FEWEST = 16  # completions; fewer show nothing
SHOWN = 400  # characters of a sample, from its end


def diagnose(groups: Sequence[Group], config: Config, training: bool) -> str | None:
    """Why a run cannot learn from completions such as these, with two samples, what an answer has to look like and what
    to change; None where nothing of the kind is seen."""
    scored = [(group, i) for group in groups for i in range(len(group.rollouts))]
    if len(scored) < FEWEST:
        return None
    unparsed, decided, causes, cures = [], "", [], []
    for group, i in scored:
        index = deciding(group.scores[i], config.rewards)
        if index is not None and group.scores[i][index].verdict == "unparsed":
            unparsed.append((group, i))
            decided = config.rewards[index].fn
    truncated = [(g, i) for g, i in scored if g.rollouts[i].finish_reason == "length"]
    count, shown = len(scored), scored
    if len(truncated) >= NEARLY_ALL * count:
        shown, longest = truncated, config.rollout.max_tokens
        causes.append(f"{len(truncated)} of {count} completions were cut at rollout.max_tokens {longest}")
        cures.append(
            f"rollout.max_tokens (now {longest}): the answer comes last; where the text goes on behind an answer, the "
            "policy does not end it: see data.template, or name a rollout.stop"
        )
    if len(unparsed) >= NEARLY_ALL * count:
        shown = unparsed
        expects = _expects(config, decided)
        causes.append(
            f"{len(unparsed)} of {count} answers could not be read by {decided}"
            + (f", which expects {expects}" if expects else "")
        )
        cures.append("data.system or data.suffix: ask for that form, for example put the final answer in \\boxed{}")
        cures.append(f"data.template (now {config.data.template}): `chat` for a model that was tuned on conversations")
    if why := _no_variance(groups, config, training):
        causes.append(why)
        if not cures:
            cures.append("the questions, which are all too easy or too hard, a reward with steps, or batch.group_size")
    if not causes:
        return None
    lines = ["nothing can be learned from completions such as these:", *(f"  - {cause}" for cause in causes)]
    for group, i in (shown[0], shown[len(shown) // 2]):
        lines += ["  sample: " + _end(group.rollouts[i].text)]
        lines += [f"    {said}" for said in _reasons(group, i, config)]
    return "\n".join([*lines, "  what to change:", *(f"  - {cure}" for cure in cures)])


def _no_variance(groups: Sequence[Group], config: Config, training: bool) -> str | None:
    """Says so where the rewards of every group are equal, so that all advantages are 0; of an evaluation, which may be
    all right, where all rewards are and no answer is correct."""
    rewards = [group.rewards(config.rewards) for group in groups]
    valid = [values[~np.isnan(values)] for values in rewards]
    if any(len(values) and np.ptp(values) > 0 for values in valid) or not any(len(values) > 1 for values in valid):
        return None
    every = np.concatenate(valid)
    right = any(is_correct(scores, config.rewards) for group in groups for scores in group.scores)
    if not training and (right or np.ptp(every) > 0):
        return None
    span = f"{every.min():g}" if np.ptp(every) == 0 else f"{every.min():g} to {every.max():g}"
    return f"the rewards inside each of {len(groups)} groups are equal ({span}): advantages and gradient are 0"


def _expects(config: Config, address: str) -> str | None:
    """What an answer has to look like, as the reward's function says by its attribute `expects`."""
    spec = next(spec for spec in config.rewards if spec.fn == address)
    return getattr(load_reward(spec.fn, spec.params).function, "expects", None)


def _reasons(group: Group, i: int, config: Config) -> list[str]:
    pairs = zip(group.scores[i], config.rewards, strict=True)
    return [f"{r.fn}: {s.value:g} {s.verdict}" + (f" ({_end(s.detail)})" if s.detail else "") for s, r in pairs if s]


def _end(text: str) -> str:
    return repr(text if len(text) <= SHOWN else "... " + text[-SHOWN:])
