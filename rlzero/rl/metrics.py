"""What a step says about itself, as plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from rewards.adapters import metric_address
from rewards.score import Verdict
from rlzero.config.rl import Reward
from rlzero.eval.evaluate import judge
from rlzero.rl.groups import Graded, Group


@dataclass
class RolloutStats:
    """Everything a step sampled, groups that were dropped again included: rewards per checker, lengths, verdicts."""

    rounds: list[Graded] = field(default_factory=list)  # the first, and those that replaced zero-variance groups
    partial: int = 0  # groups that were left unfinished for the next step

    def metrics(self, specs: tuple[Reward, ...]) -> dict[str, float]:
        """Means over all valid completions; counts over all. Lengths and totals in tokens. `verdict/<name>` is the
        share of completions that the reward which decides (`rlzero.eval.evaluate.judge`) gave that verdict."""
        groups = [group for one in self.rounds for group in one.groups]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [score for group in groups for score in group.scores]  # [completions][rewards]
        rewards = np.concatenate([one.rewards[one.valid] for one in self.rounds])
        lengths = np.array([len(rollout.tokens) for rollout in rollouts])
        verdicts = Counter(score.verdict for row in scores if (score := judge(row, specs)) is not None)
        values: dict[str, float] = {
            "reward_mean": float(rewards.mean()) if len(rewards) else float("nan"),
            "reward_std": float(rewards.std()) if len(rewards) else float("nan"),
            "zero_variance_groups": float(np.concatenate([one.degenerate for one in self.rounds]).mean()),
            "length_mean": float(lengths.mean()),
            "length_max": float(lengths.max()),
            "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
            "rollout_tokens": float(lengths.sum()),
            "completions": float(len(rollouts)),
            "sampling_rounds": float(len(self.rounds)),
            "partial_groups": float(self.partial),
            "reward_errors": float(sum(any(s and s.verdict == "error" for s in row) for row in scores)),
            "reward_timeouts": float(sum(any(s and s.verdict == "timeout" for s in row) for row in scores)),
            **{f"verdict/{name}": verdicts[name] / len(scores) for name in get_args(Verdict)},
        }
        passes, drafted, accepted = (sum(rollout.drafts[i] for rollout in rollouts) for i in range(3))
        if drafted:
            values["spec_acceptance"] = accepted / drafted  # share of the drafted tokens
            values["spec_length"] = 1 + accepted / passes  # tokens that a pass with drafts wrote
        names = reward_names(specs)
        for index in range(len(specs)):
            name = names[index]
            said = [row[index] for row in scores if row[index] is not None and row[index].verdict != "error"]
            if said:
                values[f"reward/{name}"] = float(np.mean([score.value for score in said]))
            for metric in sorted({m for score in said for m in score.metrics}):
                found = [score.metrics[metric] for score in said if metric in score.metrics]
                values[f"reward/{name}/{metric}"] = float(np.mean(found))
        return values


def reward_names(specs: Sequence[Reward]) -> list[str]:
    """What the metrics of each reward are called: its function, with its file or module where that is not enough, and
    with a number where two entries are the same function."""
    places = [metric_address(spec).rpartition(":")[::2] for spec in specs]
    short = Counter(name for _, name in places)
    full = [f"{Path(place).name.removesuffix('.py').rpartition('.')[2]}.{name}" for place, name in places]
    names = [own if short[own] == 1 else long for (_, own), long in zip(places, full, strict=True)]
    return [name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def staleness(groups: Sequence[Group], trained_version: int) -> dict[str, float]:
    """Policy versions between the sampling of a token of `groups` and its training on: mean and maximum, the share of
    tokens that an older policy sampled, and `staleness/<n>`, the share of tokens that are n versions old."""
    counts: Counter[int] = Counter()
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        for version, tokens in rollout.versions:
            counts[trained_version - version] += tokens
    total = counts.total() or 1
    return {
        "staleness_mean": sum(behind * tokens for behind, tokens in counts.items()) / total,
        "staleness_max": float(max(counts, default=0)),
        "off_policy_share": 1.0 - counts[0] / total if counts else 0.0,
        **{f"staleness/{behind}": tokens / total for behind, tokens in sorted(counts.items())},
    }
