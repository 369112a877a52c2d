"""The format reward: the template's tags once, in order, nothing outside."""

import pytest

from rewards.format import format_reward

GOOD = "<think>because</think> <answer>4</answer>"


@pytest.mark.parametrize(
    "text, in_prompt, in_completion",
    [
        (GOOD, 0, 1),
        (GOOD.removeprefix("<think>"), 1, 0),
        ("\n because\n</think>\n\n<answer>\n4\n</answer>\n", 1, 0),
    ],
)
def test_where_the_opening_tag_stands(text, in_prompt, in_completion):
    assert format_reward(text, think_tag="in_prompt").value == in_prompt
    assert format_reward(text, think_tag="in_completion").value == in_completion
    assert format_reward(text).value == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer>4</answer>",
        "<think>a</think>4",
        "<think>a</think><answer>4",
        "<think>a<answer>4</answer></think>",
        "<answer>4</answer><think>a</think>",
        "x" + GOOD,
        GOOD + "x",
        GOOD + GOOD,
        GOOD + "<answer>5</answer>",
        "<think>a</think> so <answer>4</answer>",
        "<think>a<think>b</think><answer>4</answer>",
        "<think>a</think></think><answer>4</answer>",
        "<think>a</think><answer>4</answer></answer>",
        "<think>a</think><answer><answer>4</answer>",
        "<think></think><answer>4</answer>",
        "<think> \n</think><answer>4</answer>",
        "<think>a</think><answer> </answer>",
        "<Think>a</think><answer>4</answer>",
        "<think>a< /think ></think><answer>4</answer>",
        "<think>a</think><answer>4< answer >5</answer>",
    ],
)
def test_anything_else_earns_nothing(text):
    for where in ("either", "in_prompt", "in_completion"):
        assert format_reward(text, think_tag=where).value == 0


def test_stop_token_may_follow_when_named():
    assert format_reward(GOOD + "</s>").value == 0
    assert format_reward(GOOD + "</s>", end_of_text="</s>").value == 1


def test_hostile_length_is_linear():
    assert format_reward("<think>" * 200_000).value == 0
    assert format_reward("<" * 1_000_000).value == 0


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="expected 'either'"):
        format_reward(GOOD, think_tag="maybe")
