"""Language consistency, length shaping, repetition."""

import pytest

from rewards.language import language_reward, language_share
from rewards.length import length_reward, overlong_reward
from rewards.repetition import repeated_share, repetition_reward

EN = "First we add the two numbers and then we divide the sum, so that is the mean of them."
DE = "Zuerst addieren wir die beiden Zahlen und dann teilen wir die Summe, das ist nicht schwer."
FR = "Nous ajoutons les deux nombres et alors nous divisons la somme, donc ce est la moyenne dans le cas."
ZH = "首先我们把两个数相加，然后除以二，所以答案是四十二。"
JA = "まず二つの数を足してから、二で割ります。だから答えは四十二です。"
RU = "Сначала сложим два числа, потом разделим сумму на два."


@pytest.mark.parametrize("language, text", [("en", EN), ("de", DE), ("fr", FR), ("zh", ZH), ("ja", JA), ("ru", RU)])
def test_a_text_belongs_to_its_own_language_only(language, text):
    for other in ("en", "de", "fr", "zh", "ja", "ru"):
        share = language_reward(f"<think>{text}</think><answer>42</answer>", other).value
        assert (share > 0.95) if other == language else (share < 0.35)


def test_code_formulas_and_symbols_are_not_counted():
    noise = "```python\nwenn = und + nicht\n``` "
    noise += "$x_{größe} = \\text{Länge}$ \\(\\alpha\\) `если` α β x y https://пример.рф \\boxed{ответ}"
    assert language_share(f"{EN} {noise}", "en")[0] == 1.0


def test_mixed_text_gets_the_share():
    share = language_share(f"{EN} {ZH}", "en")[0]
    assert 0.4 < share < 0.7


def test_only_the_reasoning_counts():
    assert language_reward(f"{EN}</think><answer>{ZH}</answer>").value == 1.0
    assert language_reward(f"{ZH}</think><answer>{EN}</answer>").value < 0.1


def test_no_words_is_unparsed_and_an_unknown_language_an_error():
    assert language_reward("<think>$1+1$</think>2").verdict == "unparsed"
    with pytest.raises(ValueError, match="known: "):
        language_reward(EN, "xx")


@pytest.mark.parametrize("length, value", [(0, 0.0), (60, 0.0), (80, -0.5), (100, -1.0), (500, -1.0)])
def test_overlong_penalty_is_the_one_of_dapo(length, value):
    assert overlong_reward("x" * length, limit_characters=100, buffer_characters=40).value == pytest.approx(value)


def test_length_reward_orders_the_group_and_gives_wrong_answers_nothing():
    right, wrong = "\\boxed{42}", "\\boxed{1}"
    texts = [right, "  " + right, "    " + right, wrong]
    plain = [score.value for score in length_reward(texts)]
    assert plain[3] == 0.5 and plain[2] == -0.5
    values = [score.value for score in length_reward(texts, correct="rewards.math:math_reward", answer="42")]
    assert values[3] == 0.0 and values[0] > values[1] > values[2] == -0.5
    assert [score.value for score in length_reward(["aa", "bb"])] == [0.0, 0.0]


def test_repetition_is_counted_exactly():
    assert repeated_share("a b c d", 2) == 0.0
    assert repeated_share("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert repetition_reward("the same words again " * 200, n=5).value < -0.9
    assert repetition_reward(EN).value == 0.0
    assert repetition_reward("我们" * 500, n=5).value < -0.9
