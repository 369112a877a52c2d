"""A run that cannot learn says so, with the cause, two samples and the cure; a healthy one hears nothing."""

import pytest

from rewards.score import Score
from rlzero.config.rl import Config
from rlzero.rl.diagnosis import diagnose
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout


@pytest.fixture
def config():
    return Config(
        policy={"path": "base"}, data={"train": "rows.jsonl"}, rollout={"max_tokens": 9},
        rewards=[{"fn": "rewards.math:math_reward"}, {"fn": "rewards.format:format_reward", "weight": 0.1}],
    )  # fmt: skip


def groups(verdicts: str, finish: str = "stop", form: float = 0.0, samples: int = 4) -> list[Group]:
    """One completion for every letter: c(orrect), w(rong), u(nparsed)."""
    names = {"c": "correct", "w": "wrong", "u": "unparsed"}
    made = []
    for start in range(0, len(verdicts), samples):
        part = verdicts[start : start + samples]
        scores = [[Score(float(v == "c"), names[v], detail="why"), Score(form, "correct")] for v in part]
        texts = [f"the answer {start + i}" for i in range(samples)]
        rollouts = [Rollout("p", i, (1,), [1], [0.0], [(0, 1)], finish, text) for i, text in enumerate(texts)]
        made.append(Group(Prompt("p", "q", (1,)), rollouts, scores))
    return made


@pytest.mark.parametrize("verdicts", ["cwwu" * 4, "w" * 19 + "c", "u" * 17 + "wcw", "u" * 12])
def test_a_healthy_run_and_one_too_small_to_tell_hear_nothing(config, verdicts):
    assert diagnose(groups(verdicts), config, training=True) is None


def test_unparsed_answers_are_shown_with_what_the_reward_expects(config):
    text = diagnose(groups("u" * 19 + "c"), config, training=True)
    assert "19 of 20 answers could not be read by rewards.math:math_reward, which expects one final value in" in text
    assert text.count("sample: ") == 2 and "rewards.math:math_reward: 0 unparsed ('why')" in text
    assert "data.suffix" in text and "data.template (now r1-zero)" in text and "are equal" not in text


def test_truncated_completions_name_the_limit(config):
    text = diagnose(groups("cwww" * 5, finish="length"), config, training=False)
    assert "20 of 20 completions were cut at rollout.max_tokens 9" in text and "could not be read" not in text


def test_equal_rewards_in_every_group_have_no_gradient(config):
    text = diagnose(groups("wwwwcccc" * 2, form=1.0), config, training=True)
    assert "the rewards inside each of 4 groups are equal (0.1 to 1.1): advantages and gradient are 0" in text


def test_an_evaluation_may_be_all_right_but_not_all_wrong(config):
    assert diagnose(groups("c" * 16), config, training=False) is None
    assert "are equal (0)" in diagnose(groups("w" * 16), config, training=False)
