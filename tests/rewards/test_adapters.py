"""Rewards with TRL's and verl's signatures, called as their trainers call them."""

import pytest

from rewards.load import RewardError, load_reward
from rewards.workers.runner import RewardRunner

SOURCE = """
import numpy as np

def trl_texts(prompts, completions, answer, bonus=0.0, **kwargs):
    assert prompts == ["2+2?"] * 3 and kwargs["level"] == [1, 1, 1]
    kwargs["log_metric"]("seen", np.float32(3))
    kwargs["log_extra"]("gold", answer)
    return [None if c == "skip" else float(a in c) + bonus for c, a in zip(completions, answer)]

def trl_messages(completions, **kwargs):
    return [float(c[0]["role"] == "assistant" and c[0]["content"] == "4") for c in completions]

async def trl_async(completions, **kwargs):
    return [float("nan"), 1.0]

def trl_ids(completions, completion_ids, **kwargs):
    return [0.0]

def verl_number(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if (data_source, extra_info) == ("gsm8k", {"index": 7}) and ground_truth in solution_str else 0.0

def verl_dict(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    return {"score": scale * 0.5, "acc": False, "steps": np.int64(2), "pred": solution_str}

async def verl_async(data_source, solution_str, ground_truth, **kwargs):
    return float(solution_str == ground_truth)

def verl_short(solution_str, ground_truth):
    return float(solution_str == ground_truth)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapted") / "mine.py"
    path.write_text(SOURCE)
    return str(path)


def test_a_trl_function_gets_columns_as_lists_and_its_logs_are_kept(file):
    reward = load_reward("rewards.adapters:trl", {"fn": f"{file}:trl_texts", "bonus": 0.5})
    first, wrong, none = reward.group(["a 4", "5", "skip"], {"prompt": "2+2?", "answer": "4", "level": 1})
    assert (first.value, first.verdict, first.metrics, first.detail) == (1.5, "correct", {"seen": 3.0}, "gold: 4")
    assert wrong.value == 0.5 and none is None


def test_messages_go_in_where_the_prompt_is_messages(file):
    reward = load_reward("rewards.adapters:trl", {"fn": f"{file}:trl_messages"})
    assert reward.group(["4"], {"prompt": [{"role": "user", "content": "2+2?"}]})[0].value == 1.0
    reward = load_reward("rewards.adapters:trl", {"fn": f"{file}:trl_messages", "conversational": True})
    assert reward.group(["4"], {"prompt": "2+2?"})[0].value == 1.0


def test_trls_own_accuracy_reward_runs(file):
    pytest.importorskip("trl")
    reward = load_reward("rewards.adapters:trl", {"fn": "trl.rewards:accuracy_reward", "conversational": True})
    scores = reward.group([r"\boxed{\frac{1}{3}}", r"\boxed{2}"], {"prompt": "q", "solution": r"$\frac{1}{3}$"})
    assert [s.value for s in scores] == [1.0, 0.0]


def test_a_verl_function_gets_its_three_columns_and_may_return_a_dict(file):
    row = {"data_source": "gsm8k", "reward_model": {"ground_truth": "4"}, "extra_info": {"index": 7}}
    assert load_reward("rewards.adapters:verl", {"fn": f"{file}:verl_number"}).one("it is 4", row).value == 1.0
    score = load_reward("rewards.adapters:verl", {"fn": f"{file}:verl_dict", "scale": 2.0}).one("five", row)
    assert (score.value, score.verdict, score.metrics) == (1.0, "wrong", {"acc": 0.0, "steps": 2.0})
    assert score.detail == "pred: five"
    assert load_reward("rewards.adapters:verl", {"fn": f"{file}:verl_short"}).one("4", {"answer": "4"}).value == 1.0


def test_both_run_in_workers_async_ones_too(file):
    specs = [
        {"fn": f"rewards.adapters:{kind}", "params": {"fn": f"{file}:{name}"}}
        for kind, name in (("trl", "trl_async"), ("verl", "verl_async"), ("trl", "trl_messages"))
    ]
    with RewardRunner(specs, workers=1) as runner:
        assert runner.kinds == ["group", "async", "group"]
        trl, verl, messages = runner.score(["4", "5"], {"prompt": [{"role": "user", "content": "q"}], "answer": "5"})
    assert trl[0] is None and trl[1].value == 1.0
    assert [s.value for s in verl] == [0.0, 1.0] and [s.value for s in messages] == [1.0, 0.0]


@pytest.mark.parametrize(
    "params, message",
    [
        ({"fn": "{file}:trl_ids"}, "requires .'completion_ids'."),
        ({"fn": "{file}:nothing"}, "has no function 'nothing'"),
        ({}, "missing a required argument: 'fn'"),
    ],
)
def test_what_cannot_be_adapted_is_named_at_loading(file, params, message):
    with pytest.raises(RewardError, match=message):
        load_reward("rewards.adapters:trl", {k: v.format(file=file) for k, v in params.items()})


def test_a_row_without_a_ground_truth_and_a_dict_without_a_score_are_named(file):
    reward = load_reward("rewards.adapters:verl", {"fn": f"{file}:verl_number"})
    with pytest.raises(RewardError, match="needs reward_model.ground_truth"):
        reward.one("x", {"question": "q"})
