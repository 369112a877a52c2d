"""What counts as correct, and pass@1, unbiased pass@k and cons@k of held-out questions: pure functions.

Correct has one definition, `judge`, which evaluation, rejection sampling, a step's metrics and the report share.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards.extract import final_part
from rewards.load import RewardError
from rollout.engine import Rollout, Sampling

if TYPE_CHECKING:
    from rewards.score import Score
    from rlzero.config.rl import Config, Reward
    from rlzero.rl.groups import Group


def judge(scores: Sequence[Score | None], rewards: Sequence[Reward]) -> Score | None:
    """The score whose verdict says what a completion is (correct, wrong, unparsed, timeout, error): that of the reward
    of the greatest weight that applies to the row, the first of equals. So the task's own checker decides, not those
    of form beside it. None where no reward applies."""
    index = deciding(scores, rewards)
    return None if index is None else scores[index]


def deciding(scores: Sequence[Score | None], rewards: Sequence[Reward]) -> int | None:
    """Which of the rewards `judge` listens to."""
    applying = [i for i, score in enumerate(scores) if score is not None]
    return max(applying, key=lambda i: rewards[i].weight, default=None)  # max keeps the first of equals


def is_correct(scores: Sequence[Score | None], rewards: Sequence[Reward]) -> bool | None:
    """Whether a completion counts as correct (see `judge`); None where its checker failed or no reward applies."""
    score = judge(scores, rewards)
    return None if score is None or score.verdict == "error" else score.verdict == "correct"


def sampling(config: Config) -> Sampling:
    """How held-out questions are answered, in a run and by `rlzero eval` alike. The noise is keyed by the policy's step
    and the question (see `tag`), never by the run's seed: runs of different seeds are compared on equal noise."""
    options, rollout = config.evaluation, config.rollout
    return Sampling(rollout.max_tokens, options.temperature, options.top_p, stop=rollout.stop, seed=0)


def tag(step: int) -> str:
    """What keys the sampling noise of the evaluation of the policy that has `step` steps behind it."""
    return f"evaluation.{step}"


@dataclass(frozen=True)
class Outcome:
    """One completion of a question. `correct` is None where the checker itself failed: such a sample is counted as an
    error and in nothing else. `answer` is the extracted answer, None where the checker could not read one."""

    correct: bool | None
    answer: str | None
    tokens: int
    truncated: bool


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples drawn without replacement from `samples`, of which `correct` are right,
    is right: 1 - C(n - c, k) / C(n, k), the unbiased estimate of arXiv 2107.03374, equation 1."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {samples} samples with {correct} correct: needs 0 <= correct <= n and 1 <= k <= n"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def consensus(outcomes: Sequence[Outcome]) -> bool:
    """Whether the answer that most samples give is correct (cons@k of arXiv 2501.12948, majority voting). Samples
    without an answer do not vote; of equally frequent answers the one given first wins; where samples with one answer
    are judged differently (a checker that also reads the reasoning), their majority decides."""
    votes = Counter(o.answer for o in outcomes if o.answer is not None and o.correct is not None)
    if not votes:
        return False
    winner = max(votes, key=lambda answer: votes[answer])  # max keeps the first of equals, a Counter the order of votes
    verdicts = [o.correct for o in outcomes if o.answer == winner and o.correct is not None]
    return sum(verdicts) * 2 > len(verdicts)


def summarise(groups: Sequence[Group], rewards: Sequence[Reward]) -> dict[str, float]:
    """The figures of an evaluation, from its scored groups and the config's rewards; see `figures`. Raises RewardError
    where no completion has a verdict."""
    scores = [of_sample for group in groups for of_sample in group.scores]
    if scores and all(is_correct(of_sample, rewards) is None for of_sample in scores):
        raise RewardError(why_unscored(scores, rewards))
    return figures([outcomes(group, rewards) for group in groups])


def why_unscored(scores: Sequence[Sequence[Score | None]], rewards: Sequence[Reward]) -> str:
    """Why none of the completions [completions][rewards] has a reward: which checkers failed and how, or that none
    applied."""
    failed = [(r.fn, s) for row in scores for s, r in zip(row, rewards, strict=True) if s and s.verdict == "error"]
    if not failed:
        checkers = ", ".join(reward.fn for reward in rewards)
        return f"no reward applied to any of {len(scores)} completions: {checkers} returned None for each"
    times = ", ".join(f"{fn} ({count} times)" for fn, count in Counter(fn for fn, _ in failed).items())
    fn, score = failed[0]
    first = f"The first, of {fn}:\n{score.detail.strip()}"
    return f"all {len(scores)} completions ended in a checker's error: {times}. {first}"


def figures(questions: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """The figures of an evaluation, one inner sequence per question.

    `pass_at_1` is the mean over questions of the share of correct samples and `pass_at_1_stderr` its standard error
    over questions; `pass_at_k` and `cons_at_k` use all k samples of a question; `n` is k, `prompts` the number of
    questions; `length_mean` is in tokens; `truncated`, `unparsed` and `errors` are shares of all samples.
    """
    if not questions:
        raise ValueError("an evaluation without questions has no result")
    valid = [[o for o in outcomes if o.correct is not None] for outcomes in questions]
    graded = [outcomes for outcomes in valid if outcomes]
    everything = [o for outcomes in questions for o in outcomes]
    if not graded:
        raise ValueError(f"all {len(everything)} samples ended in a checker's error; there is no result")
    shares = [sum(bool(o.correct) for o in outcomes) / len(outcomes) for outcomes in graded]
    mean = sum(shares) / len(shares)
    spread = sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)
    return {
        "pass_at_1": mean,
        "pass_at_1_stderr": math.sqrt(spread / len(shares)),
        "pass_at_k": sum(
            pass_at_k(len(outcomes), sum(bool(o.correct) for o in outcomes), len(outcomes)) for outcomes in graded
        )
        / len(graded),
        "cons_at_k": sum(consensus(outcomes) for outcomes in graded) / len(graded),
        "n": max(len(outcomes) for outcomes in questions),
        "prompts": len(questions),
        "length_mean": sum(o.tokens for o in everything) / len(everything),
        "truncated": sum(o.truncated for o in everything) / len(everything),
        "unparsed": sum(o.answer is None for o in everything) / len(everything),
        "errors": sum(o.correct is None for o in everything) / len(everything),
    }


def outcomes(group: Group, rewards: Sequence[Reward]) -> list[Outcome]:
    """What the scored completions of one question amount to."""
    return [_outcome(rollout, scores, rewards) for rollout, scores in zip(group.rollouts, group.scores, strict=True)]


def answer_of(completion: str) -> str | None:
    """The answer a completion votes for, spaces taken out: what stands in the last `\\boxed{}` of its final part, else
    the final part itself. None where there is no final part."""
    text = final_part(completion).text
    if text is None:
        return None
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                text = text[start + 7 : end]
                break
    return re.sub(r"\s+", "", text) or None


def _outcome(rollout: Rollout, scores: Sequence[Score | None], rewards: Sequence[Reward]) -> Outcome:
    score = judge(scores, rewards)
    unparsed = score is not None and score.verdict == "unparsed"
    return Outcome(
        correct=is_correct(scores, rewards),
        answer=None if unparsed else answer_of(rollout.text),
        tokens=len(rollout.tokens),
        truncated=rollout.finish_reason == "length",
    )
