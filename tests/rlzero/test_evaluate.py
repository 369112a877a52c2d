"""pass@1, pass@k and cons@k against direct counting; an evaluation on several workers."""

import itertools
import math
import random

import pytest

from rewards.load import RewardError
from rewards.score import Score
from rlzero.config.rl import Config, Reward
from rlzero.data import dump
from rlzero.eval import evaluate
from rlzero.eval import run as evaluation_run
from rlzero.eval.evaluate import Outcome, answer_of, consensus, figures, pass_at_k, summarise
from rlzero.report.log import read_lines
from rlzero.rl.groups import Group
from rlzero.rl.metrics import reward_names
from rollout.engine import Prompt, Rollout


def outcomes(*pairs: tuple[str | None, bool | None]) -> list[Outcome]:
    return [Outcome(correct, answer, tokens=10, truncated=False) for answer, correct in pairs]


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_refuses_counts_that_cannot_be():
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="needs 0 <= correct <= n"):
            pass_at_k(n, c, k)


def test_the_most_frequent_answer_decides_even_where_a_minority_is_right():
    assert not consensus(outcomes(("7", True), ("5", False), ("5", False)))
    assert consensus(outcomes(("7", True), ("7", True), ("5", False), ("4", False)))


def test_of_equally_frequent_answers_the_first_wins():
    assert consensus(outcomes(("7", True), ("5", False)))
    assert not consensus(outcomes(("5", False), ("7", True)))


def test_samples_without_an_answer_and_checker_errors_do_not_vote():
    assert consensus(outcomes((None, False), (None, False), ("5", None), ("5", None), ("7", True)))
    assert not consensus(outcomes((None, False), ("5", None)))


def test_figures_equal_direct_counting():
    rng = random.Random(0)
    questions = [
        [
            Outcome(rng.random() < 0.4, rng.choice(["a", "b", None]), rng.randint(1, 90), rng.random() < 0.2)
            for _ in range(8)
        ]
        for _ in range(30)
    ]
    result = figures(questions)
    shares = [sum(o.correct for o in q) / 8 for q in questions]
    mean = sum(shares) / 30
    assert result["pass_at_1"] == pytest.approx(mean)
    assert result["pass_at_1_stderr"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in shares) / 29 / 30))
    assert result["pass_at_k"] == pytest.approx(sum(any(o.correct for o in q) for q in questions) / 30)
    everything = [o for q in questions for o in q]
    assert result["length_mean"] == pytest.approx(sum(o.tokens for o in everything) / 240)
    assert result["truncated"] == pytest.approx(sum(o.truncated for o in everything) / 240)
    assert result["unparsed"] == pytest.approx(sum(o.answer is None for o in everything) / 240)
    assert (result["n"], result["prompts"], result["errors"]) == (8, 30, 0)


def test_a_failed_checker_is_counted_as_an_error_and_in_nothing_else():
    result = figures([outcomes(("a", True), ("a", None)), outcomes(("b", None), ("b", None))])
    assert result["pass_at_1"] == 1.0 and result["errors"] == 0.75
    with pytest.raises(ValueError, match="all 2 samples ended in a checker's error"):
        figures([outcomes(("b", None), ("b", None))])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>9</think> <answer> (3 + 5) * 8 </answer>", "(3+5)*8"),
        (r"<think>x</think> so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think>x</think> \boxed{1} no, \boxed{2}", "2"),
        ("<think>never closed", None),
        ("<think>x</think><answer></answer>", None),
    ],
)
def test_what_a_completion_votes_for(completion, answer):
    assert answer_of(completion) == answer


def test_the_reward_of_the_greatest_weight_that_applies_judges():
    rollout = Rollout("p", 0, (1,), [2], [0.0], [(0, 1)], "stop", "<think>x</think><answer>1</answer>")
    right, wrong = Score(1.0, "correct"), Score(0.0, "wrong")
    group = Group(Prompt("p", "q", (1,)), [rollout], [[right, wrong, None]])
    specs = [Reward(fn="m:form", weight=0.1), Reward(fn="m:task", weight=1.0), Reward(fn="m:other", weight=2.0)]
    assert evaluate.outcomes(group, specs)[0].correct is False
    equal = [Reward(fn="m:a"), Reward(fn="m:b"), Reward(fn="m:c")]
    assert evaluate.outcomes(group, equal)[0].correct is True


def test_a_checkpoint_evaluated_alone_by_two_workers_has_the_figures_of_its_run(
    local_ray, finished, write_config, tmp_path
):
    (last,) = (line for line in read_lines(finished / "evals.jsonl") if line["step"] == 4)
    changes = {"policy.path": str(finished / "checkpoints" / "step-000004"), "rollout.workers": 2, "seed": 7}
    config = Config.load(write_config(tmp_path, **changes))
    groups = evaluation_run.run(config, tmp_path / "groups.jsonl")
    result = evaluate.summarise(groups, config.rewards)
    assert {name: last[name] for name in result} == result
    assert dump.load_rewards(tmp_path / "groups.jsonl")[1].weight == 0.5


def test_without_any_verdict_the_checker_and_its_cause_are_named():
    rollout = Rollout("p", 0, (1,), [2], [0.0], [(0, 1)], "stop", "x")
    specs = [Reward(fn="m:form", weight=0.1), Reward(fn="m:task")]
    group = Group(Prompt("p", "q", (1,)), [rollout] * 2, [[None, Score.error("KeyError: 'gold'")]] * 2)
    with pytest.raises(RewardError, match=r"all 2 completions .* error: m:task \(2 times\)(.|\n)*KeyError: 'gold'"):
        summarise([group], specs)
    group.scores = [[None, None]] * 2
    with pytest.raises(RewardError, match="no reward applied to any of 2 completions: m:form, m:task returned None"):
        summarise([group], specs)


def test_rewards_of_one_name_have_metrics_of_their_own():
    def names(*rewards):
        return reward_names([Reward(**({"fn": r} if isinstance(r, str) else r)) for r in rewards])

    assert names("./a.py:score", "b.py:other") == ["score", "other"]
    assert names("./a.py:score", "x/b.py:score", "rewards.math:score") == ["a.score", "b.score", "math.score"]
    assert names("x/a.py:score", "y/a.py:score", "z:f") == ["a.score_1", "a.score_2", "f"]
    adapted = [{"fn": "rewards.adapters:trl", "params": {"fn": f"./{place}.py:f"}} for place in "ab"]
    assert names(*adapted) == ["a.f", "b.f"]
