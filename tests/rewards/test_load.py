"""Loading a reward: addresses, arguments by name, the plural and the async form, messages that say what to do."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from rewards.load import RewardError, RewardSpec, load_reward, to_score
from rewards.score import Score

SOURCE = """
import asyncio
from rewards.score import Score

def length(completion, answer, limit=10):
    return 1.0 if len(completion) <= limit and answer in completion else 0.0

def everything(completion, **row):
    return float(len(row))

def rank(completions, answer):
    return [float(len(c)) for c in completions]

async def later(completion, answer):
    await asyncio.sleep(0)
    return Score(0.5, "correct", {"seen": 1.0})

def skip(completion):
    return None

def short_list(completions):
    return [1.0]

def nothing(text):
    return 1.0
"""


@pytest.fixture()
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_arguments_come_from_the_row_by_name(file):
    reward = load_reward(f"{file}:length")
    assert reward.one("it is 4", {"answer": "4", "other": 1}) == Score(1.0, "correct")
    assert reward.one("it is 5", {"answer": "4"}) == Score(0.0, "wrong")


def test_params_win_over_columns(file):
    assert load_reward(f"{file}:length", {"limit": 3}).one("it is 4", {"answer": "4", "limit": 99}).value == 0.0


def test_a_reward_may_say_which_rows_can_never_be_paid(file):
    file.write_text(SOURCE + "length.check_row = lambda row: 'no answer' if row['answer'] is None else None\n")
    reward = load_reward(f"{file}:length")
    assert reward.check_row({"answer": None}) == "no answer" and reward.check_row({"answer": "4"}) is None
    assert load_reward(f"{file}:length", {"answer": "4"}).check_row({"answer": None}) is None
    assert load_reward(f"{file}:skip").check_row({"answer": None}) is None


def test_var_keyword_takes_the_whole_row_without_the_completion(file):
    assert load_reward(f"{file}:everything").one("x", {"a": 1, "b": 2, "completion": "y"}).value == 2.0


def test_plural_form_gets_the_group_and_its_one_row(file):
    reward = load_reward(f"{file}:rank")
    assert [s.value for s in reward.group(["a", "bb"], {"answer": "4"})] == [1.0, 2.0]
    with pytest.raises(RewardError, match="one prompt"):
        reward.group(["a", "bb"], [{"answer": "4"}, {"answer": "5"}])


def test_async_function_is_awaited(file):
    assert load_reward(f"{file}:later").one("x", {"answer": "4"}) == Score(0.5, "correct", {"seen": 1.0})


def test_none_means_not_applicable(file):
    assert load_reward(f"{file}:skip").one("x", {}) is None


def test_group_of_the_wrong_length_is_an_error(file):
    with pytest.raises(RewardError, match="for a group of 2"):
        load_reward(f"{file}:short_list").group(["a", "b"], {})


@pytest.mark.parametrize(
    "address, params, message",
    [
        ("{file}:lenght", {}, "Did you mean 'length'"),
        ("{file}:nothing", {}, "takes 'completion'"),
        ("{file}:length", {"limt": 3}, "did you mean 'limit'"),
        ("{file}x.py:length", {}, "no file"),
        ("no_such_package.module:fn", {}, "no module 'no_such_package'"),
        ("rewards.no_such:fn", {}, "no module 'rewards.no_such'"),
        ("rewards.math", {}, "is not a reward's address"),
    ],
)
def test_loading_errors_say_what_to_do(file, address, params, message):
    with pytest.raises(RewardError, match=message.replace("(", r"\(")):
        load_reward(address.format(file=file), params)


def test_a_missing_column_is_named(file):
    with pytest.raises(RewardError, match=r"column \['answer'\]; the row has \['target'\]"):
        load_reward(f"{file}:length").one("x", {"target": 3})


def test_an_import_error_inside_the_module_comes_through(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_at_all"):
        load_reward(f"{tmp_path}/broken.py:fn")


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0", [1.0], Score(math.nan, "wrong")])
def test_a_value_that_is_no_finite_number_is_refused(value):
    with pytest.raises(RewardError):
        to_score(value, "a:b")


def test_plain_numbers_of_numpy_and_torch_are_taken_as_numbers():
    given = Score(np.float32(0.5), "correct", {"n": np.int64(3), "t": torch.tensor(2.0), "flag": np.bool_(True)}, None)
    made = to_score(given, "a:b")
    assert made == Score(0.5, "correct", {"n": 3.0, "t": 2.0, "flag": 1.0}, "")
    assert {type(x) for x in (made.value, *made.metrics.values())} == {float} and json.dumps(asdict(made))
    assert to_score(torch.tensor([1.5]), "a:b").value == 1.5 and to_score(np.array(2), "a:b").value == 2.0
    assert to_score(Score(1, "correct", None), "a:b") == Score(1.0, "correct")


def test_a_group_may_come_as_an_array(tmp_path):
    (tmp_path / "arrays.py").write_text("import numpy as np\ndef f(completions): return np.ones(len(completions))\n")
    assert [s.value for s in load_reward(f"{tmp_path}/arrays.py:f").group(["a", "b"], {})] == [1.0, 1.0]


@pytest.mark.parametrize(
    "value, message",
    [
        (Score(1.0, "right"), "a:b returned the verdict 'right'; expected one of .*'correct'"),
        (Score(1.0, "correct", {"n": "many"}), "a:b returned str 'many' as the metric 'n'"),
        (Score(1.0, "correct", {"n": np.ones(2)}), "as the metric 'n'; give a finite number"),
        (Score(None, "wrong"), "a:b returned a Score of value NoneType None"),
        ({"score": 1.0}, "a:b returned dict .*rewards.adapters:verl"),
        (np.ones(2), "a:b returned ndarray"),
    ],
)
def test_what_is_not_plain_is_named_with_its_function(value, message):
    with pytest.raises(RewardError, match=message):
        to_score(value, "a:b")


def test_a_rewards_own_time_limit_is_its_default(tmp_path):
    (tmp_path / "limits.py").write_text(
        "def a(completion): return 1\nasync def b(completion): return 1\ndef c(completion): return 1\nc.timeout_s = 9\n"
    )
    assert [load_reward(f"{tmp_path}/limits.py:{name}").timeout_s for name in "abc"] == [5.0, 300.0, 9.0]


def test_spec_from_a_config_entry():
    assert RewardSpec.of({"fn": "a:b", "weight": 0.1, "timeout": 3}) == RewardSpec("a:b", 0.1, 3)
    with pytest.raises(RewardError, match=r"remove or rename \['wieght'\]"):
        RewardSpec.of({"fn": "a:b", "wieght": 1})
    with pytest.raises(RewardError, match="positive"):
        RewardSpec.of({"fn": "a:b", "timeout": 0})
