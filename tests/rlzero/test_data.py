"""Rows become prompts, prompts a stream that goes on exactly where it stopped; bad input is named with its place."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from rewards.load import load_reward
from rlzero.config.rl import Config
from rlzero.data import prepare
from rlzero.data.prepare import prepared
from rlzero.data.prompts import (
    R1_ZERO_TEMPLATE,
    Prompts,
    PromptStream,
    check_tokenizer,
    load_prompts,
    load_tokenizer,
)
from rlzero.data.sources import DataError, Row, load_rows, read_file
from rlzero.examples.countdown import task as countdown
from rlzero.examples.countdown import text as base_text


@pytest.fixture(scope="module")
def tokenizer():
    return base_text.tokenizer()


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines: str | bytes):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
        return path

    return write


def questions(count: int) -> list[Row]:
    return [Row({"prompt": f"Make {i} from 1, {i}.", "answer": str(i)}, f"data:{i}") for i in range(count)]


def prompts(tokenizer, count: int = 10, **options) -> Prompts:
    return Prompts(questions(count), tokenizer, **{"max_prompt_tokens": 100, **options})


# --- the stream ---


def test_every_epoch_hands_out_every_prompt_once_in_an_order_of_its_own(tokenizer):
    data = prompts(tokenizer, 20)
    stream = PromptStream(data, seed=3)
    epochs = [stream.take(20) for _ in range(3)]
    orders = [[p.text for p in epoch] for epoch in epochs]
    assert all(sorted(order) == sorted(p.text for p in data) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_stream_resumed_at_any_position_goes_on_as_if_never_stopped(tokenizer):
    whole = [p.id for p in PromptStream(prompts(tokenizer), seed=1).take(35)]
    for position in (0, 1, 9, 10, 11, 27):
        first = PromptStream(prompts(tokenizer), seed=1)
        first.used(first.take(position))
        second = PromptStream(prompts(tokenizer), seed=1)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [p.id for p in second.take(35 - position)] == whole[position:]


def test_prompts_that_were_taken_and_not_used_come_first_in_a_resumed_stream(tokenizer):
    def resumed(stream: PromptStream) -> PromptStream:
        after = PromptStream(prompts(tokenizer, 8), seed=1)
        after.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        return after

    stream = PromptStream(prompts(tokenizer, 8), seed=1)
    taken = stream.take(13)  # into the second epoch
    stream.used([p for i, p in enumerate(taken) if i not in (2, 5, 11)])
    stream = resumed(stream)
    assert stream.take(1) == [taken[2]]
    stream = resumed(stream)  # stopped again before that one was used: it comes again
    again = stream.take(1)
    assert sorted(stream.state_dict()["unused"]) == [2, 5, 11]
    stream.used(again)
    assert again == [taken[2]] and stream.take(2) == [taken[5], taken[11]]
    whole = PromptStream(prompts(tokenizer, 8), seed=1).take(16)
    assert stream.take(3) == whole[13:]


def test_the_order_depends_on_the_seed_and_not_on_the_size_of_the_steps(tokenizer):
    def order(seed: int, size: int) -> list[str]:
        stream = PromptStream(prompts(tokenizer, 12), seed)
        return [p.id for _ in range(24 // size) for p in stream.take(size)]

    assert order(1, 4) == order(1, 6) == order(1, 24) != order(2, 4)


def test_ids_are_distinct_across_epochs_so_that_a_batch_never_holds_one_twice(tokenizer):
    taken = PromptStream(prompts(tokenizer, 4), seed=0).take(12)
    assert max(Counter(p.id for p in taken).values()) == 1
    assert len({p.text for p in taken}) == 4


@pytest.mark.parametrize("change", ["seed", "data"])
def test_a_state_of_other_data_or_another_seed_is_refused(tokenizer, change):
    state = PromptStream(prompts(tokenizer), seed=1).state_dict()
    other = PromptStream(prompts(tokenizer, 11 if change == "data" else 10), seed=2 if change == "seed" else 1)
    with pytest.raises(DataError, match=f"another {change}"):
        other.load_state_dict(state)


# --- prompts ---


def test_an_id_depends_on_the_content_alone(tokenizer):
    rows = questions(6)
    forward = {p.row["answer"]: p.id for p in Prompts(rows, tokenizer, max_prompt_tokens=100)}
    backward = {p.row["answer"]: p.id for p in Prompts(rows[::-1], tokenizer, max_prompt_tokens=100)}
    assert forward == backward and len(set(forward.values())) == 6
    other = Prompts([Row({**rows[0].values, "answer": "other"}, "x")], tokenizer, max_prompt_tokens=100)[0]
    assert other.id not in forward.values()


def test_the_r1_zero_prompt_ends_where_the_model_opens_its_thought(tokenizer):
    prompt = prompts(tokenizer, 1)[0]
    assert prompt.text == R1_ZERO_TEMPLATE.format(prompt="Make 0 from 1, 0.") and prompt.text.endswith("Assistant:")
    assert tokenizer.decode(prompt.tokens) == prompt.text


def test_braces_in_a_question_are_left_alone(tokenizer):
    row = Row({"prompt": r"Simplify \frac{1}{2} {x}"}, "x")
    assert r"\frac{1}{2} {x}" in Prompts([row], tokenizer, max_prompt_tokens=200)[0].text


def test_a_chat_template_gets_the_question_as_the_users_turn():
    tokenizer = base_text.tokenizer()
    turns = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    text = prompts(tokenizer, 1, template="chat")[0].text
    assert text == "<user>Make 0 from 1, 0.<assistant>"
    several = [Row({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]}, "x")]
    chat = Prompts(several, tokenizer, template="chat", max_prompt_tokens=100)
    assert chat[0].text == "<system>Be brief.<user>1+1?<assistant>"


def test_chat_without_a_chat_template_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no chat template; use r1-zero or none"):
        prompts(tokenizer, 1, template="chat")


def test_the_answer_column_becomes_answer(tokenizer):
    rows = [Row({"problem": "1+1?", "solution": "2"}, "x")]
    (prompt,) = Prompts(rows, tokenizer, prompt_column="problem", answer_column="solution", max_prompt_tokens=100)
    assert prompt.row == {"problem": "1+1?", "solution": "2", "answer": "2"}


def test_exact_duplicates_are_left_out_and_said(tokenizer, caplog):
    rows = questions(3) + questions(2)
    assert len(Prompts(rows, tokenizer, max_prompt_tokens=100)) == 3
    assert "left out 2 exact duplicates among 5 rows" in caplog.text


# --- bad input ---


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such data file"):
        read_file(tmp_path / "nothing.jsonl")


def test_malformed_lines_are_listed_with_file_and_line(jsonl):
    path = jsonl('{"prompt": "a"}', '{"prompt": ', "", "[1]", b'{"prompt": "\xff"}', '"text"')
    with pytest.raises(DataError) as error:
        read_file(path)
    text = str(error.value)
    assert "4 bad lines" in text
    assert (
        "data.jsonl:2: malformed JSON at column" in text and "data.jsonl:4: expected a JSON object, found list" in text
    )
    assert "data.jsonl:5: not UTF-8" in text and "data.jsonl:6: expected a JSON object, found str" in text


def test_windows_line_ends_and_blank_lines_are_fine(jsonl):
    rows = read_file(jsonl('{"prompt": "a"}\r', "", '{"prompt": "b\u2028c"}'))
    assert [(row.values["prompt"], row.where.rpartition(":")[2]) for row in rows] == [("a", "1"), ("b\u2028c", "3")]


def test_an_empty_data_set_is_an_error(jsonl):
    with pytest.raises(DataError, match="the data set is empty"):
        load_rows(str(jsonl("")), {}, "train", 0)


@pytest.mark.parametrize("columns", [{"prompt_column": "text"}, {"answer_column": "gold"}])
def test_a_missing_column_is_an_error_that_lists_the_columns(tokenizer, columns):
    (name,) = columns.values()
    with pytest.raises(DataError, match=rf"data:0: no column '{name}' \(in 3 of 3 rows\); found prompt, answer"):
        prompts(tokenizer, 3, **columns)


def test_a_prompt_that_is_no_text_is_an_error(tokenizer):
    with pytest.raises(DataError, match="f:7: the prompt must be a text, found 3"):
        Prompts([Row({"prompt": 3}, "f:7")], tokenizer, max_prompt_tokens=100)


def test_prompts_longer_than_the_context_leaves_are_an_error_with_their_lines(tokenizer):
    rows = [*questions(2), Row({"prompt": "1 " * 300}, "data:77")]
    with pytest.raises(DataError, match=r"(?s)1 of 3 prompts are longer than the 100 tokens.*data:77: \d+ tokens"):
        Prompts(rows, tokenizer, max_prompt_tokens=100)


def test_a_tokenizer_without_eos_is_an_error():
    tokenizer = base_text.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        check_tokenizer(tokenizer, "base")


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


# --- sources ---


def test_countdown_trains_and_evaluates_on_different_splits():
    train = load_rows("countdown", {"count": 50}, "train", seed=1)
    held_out = load_rows("countdown", {"count": 50}, "evaluation", seed=1)
    assert {countdown.split_of(tuple(row.values["numbers"])) for row in train} == {"train"}
    assert {countdown.split_of(tuple(row.values["numbers"])) for row in held_out} == {"held_out"}


def test_an_unknown_parameter_of_a_generator_is_an_error():
    with pytest.raises(DataError, match="countdown takes no parameter size; it takes .*sizes"):
        load_rows("countdown", {"size": 3}, "train", 0)


def test_a_generator_from_a_file_gets_params_and_seed(tmp_path):
    (tmp_path / "gen.py").write_text("def rows(n, seed):\n    return [{'prompt': f'{seed}/{i}'} for i in range(n)]\n")
    rows = load_rows(f"{tmp_path}/gen.py:rows", {"n": 2}, "train", seed=5)
    assert [(r.values["prompt"], r.where.rpartition("/")[2]) for r in rows] == [
        ("5/0", "gen.py:rows[0]"),
        ("5/1", "gen.py:rows[1]"),
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def rows(n): return []", "cannot be called with"),
        ("def rows(): return []", "the data set is empty"),
        ("def rows(): raise KeyError('x')", "failed: KeyError"),
        ("def rows(): return [1]", r"rows\[0\] is not a dictionary"),
        ("def row(): pass", "has no function 'rows'"),
        ("import nothing_of_that_name", "does not import: ModuleNotFoundError"),
    ],
)
def test_a_generator_that_cannot_be_used_is_an_error(tmp_path, code, message):
    (tmp_path / "gen.py").write_text(code)
    with pytest.raises(DataError, match=message):
        load_rows(f"{tmp_path}/gen.py:rows", {}, "train", 0)


def test_params_for_a_file_are_an_error(jsonl):
    with pytest.raises(DataError, match="is a file and takes none"):
        load_rows(str(jsonl('{"prompt": "a"}')), {"n": 1}, "train", 0)


def test_held_out_prompts_are_the_same_for_every_seed(tokenizer, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "policy: {path: base}\nrewards: [{fn: 'rlzero.examples.countdown:countdown_reward'}]\n"
        "data: {train: countdown, evaluation: countdown, params: {count: 40}}\nevaluation: {prompts: 8}\n"
    )
    first, second = (
        [p.id for p in load_prompts(Config.load(tmp_path / "run.yaml", [f"seed={seed}"]), tokenizer, "evaluation")]
        for seed in (0, 1)
    )
    assert first == second and len(first) == 8


# --- rows that others wrote ---


def math_rewards(*addresses):
    return [load_reward(address) for address in addresses or ("rewards.math:math_reward",)]


def test_golds_that_can_never_be_paid_are_counted_over_the_whole_file(tokenizer):
    golds = ["2", None, float("nan"), ["3"], "", "{", 4]
    rows = [Row({"prompt": f"question {i}", "answer": gold}, f"f:{i}") for i, gold in enumerate(golds)]
    with pytest.raises(DataError, match=r"5 of 7 rows can never be paid(.|\n)*f:1: (.|\n)*f:2: (.|\n)*f:3: "):
        Prompts(rows, tokenizer, max_prompt_tokens=100, rewards=math_rewards())
    kept = Prompts(rows, tokenizer, max_prompt_tokens=100, rewards=math_rewards(), bad_rows="drop")
    assert [prompt.row["answer"] for prompt in kept] == ["2", 4]


def test_a_column_that_a_reward_needs_is_missed_when_the_data_is_loaded(tokenizer):
    rows = [Row({"prompt": "1+1?", "solution": "2"}, "f:1")]
    with pytest.raises(DataError, match=r"f:1: no column 'answer', which rewards.math:math_reward needs .in 1 of 1"):
        Prompts(rows, tokenizer, max_prompt_tokens=100, rewards=math_rewards())
    (prompt,) = Prompts(rows, tokenizer, max_prompt_tokens=100, rewards=math_rewards(), answer_column="solution")
    assert prompt.row["answer"] == "2"


def test_a_column_may_stand_inside_another(tokenizer):
    row = Row({"prompt": "1+1?", "reward_model": {"style": "rule", "ground_truth": "2"}}, "f:1")
    (prompt,) = Prompts([row], tokenizer, max_prompt_tokens=100, answer_column="reward_model.ground_truth")
    assert prompt.row["answer"] == "2"


def test_levels_of_any_type_are_asked_in_the_order_of_their_numbers(tokenizer):
    levels = ["Level 3", None, 2, "hard", float("nan"), "1.5", ["x"]]
    rows = [Row({"prompt": f"question {i}", "level": level}, f"f:{i}") for i, level in enumerate(levels)]
    taken = PromptStream(Prompts(rows, tokenizer, max_prompt_tokens=100), seed=0).take(len(rows))
    assert [prompt.row["level"] for prompt in taken][-3:] == ["1.5", 2, "Level 3"]


def test_system_and_suffix_stand_around_a_question():
    tokenizer = base_text.tokenizer()
    assert prompts(tokenizer, 1, template="none", suffix="\nBox it.")[0].text == "Make 0 from 1, 0.\nBox it."
    tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    chat = {"template": "chat", "system": "Be brief.", "suffix": " Box it."}
    assert prompts(tokenizer, 1, **chat)[0].text == "<system>Be brief.<user>Make 0 from 1, 0. Box it."
    own = [Row({"prompt": [{"role": "system", "content": "Own."}, {"role": "user", "content": "1?"}]}, "x")]
    assert Prompts(own, tokenizer, max_prompt_tokens=100, **chat)[0].text == "<system>Own.<user>1? Box it."


def test_prompts_that_cannot_be_asked_are_named_with_row_cause_and_cure():
    tokenizer = base_text.tokenizer()
    refusal = "{{ raise_exception('System role not supported') }}"
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}" + refusal + "{% endif %}{{ messages[0].content }}"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1"}]
    asked = [Row({"prompt": "1"}, "f:1"), Row({"prompt": system}, "f:2"), Row({"prompt": "\ud800"}, "f:3")]
    with pytest.raises(DataError) as error:
        Prompts(asked, tokenizer, template="chat", max_prompt_tokens=100)
    assert "2 of 3 prompts cannot be asked" in str(error.value)
    assert "f:2: the chat template refuses this conversation: System role not supported; write" in str(error.value)
    assert "f:3: half a character" in str(error.value)


def test_a_policys_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"policy.path: .*nothing: no such folder \(looked in "):
        load_tokenizer(tmp_path / "nothing")


# --- work on every row ---


def double(rows):
    numbers = [row.values["n"] for row in rows]
    return [{"n": np.array([2 * n], np.int32), "text": f"é{n}" * n} for n in numbers]


def numbered(count):
    return [Row({"n": i % 7}, f"f:{i}") for i in range(count)]


def test_processes_give_what_one_would_in_the_order_of_the_rows(monkeypatch):
    rows, seen = numbered(prepare.SMALL + prepare.CHUNK + 3), []
    several = prepared(lambda: rows, double, None, lambda done, total: seen.append((done, total)))
    monkeypatch.setattr(prepare, "SMALL", len(rows))
    one = prepared(lambda: rows, double, None, lambda done, total: None)
    assert len(several) == len(rows) and [several.value("text", i) for i in (0, 3)] == ["", "é3é3é3"]
    assert {name: array.tolist() for name, array in several.arrays.items()} == {
        name: array.tolist() for name, array in one.arrays.items()
    }
    assert seen[-1] == (len(rows), len(rows)) and len(seen) == 6


def test_a_result_is_found_again_and_a_damaged_one_is_made_again(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prepare, "SMALL", 10)
    calls = []

    def rows():
        calls.append(1)
        return numbered(20)

    first, again = (prepared(rows, double, "key", lambda done, total: None) for _ in range(2))
    assert len(calls) == 1 and again.arrays["n"].tolist() == first.arrays["n"].tolist()
    (tmp_path / "rlzero" / "key.safetensors").write_bytes(b"cut")
    third = prepared(rows, double, "key", lambda done, total: None)
    assert len(calls) == 2 and third.arrays["n"].tolist() == first.arrays["n"].tolist() and "made anew" in caplog.text


def test_without_a_folder_to_keep_them_results_are_made_all_the_same(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(prepare, "SMALL", 10)
    assert len(prepared(lambda: numbered(20), double, "key", lambda done, total: None)) == 20
    assert "are not kept" in caplog.text


def test_a_process_that_is_killed_is_an_error(monkeypatch):
    def dies(rows):
        os._exit(1)

    with pytest.raises(RuntimeError, match="a process that prepared rows was killed"):
        prepared(lambda: numbered(prepare.SMALL + 1), dies, None, lambda done, total: None)


def test_prompts_are_the_same_when_they_are_found_again(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prepare, "SMALL", 10)
    first = list(prompts(tokenizer, 30))
    assert len(list((tmp_path / "rlzero").glob("*.safetensors"))) == 1
    monkeypatch.setattr(Prompts, "_prepare", None)
    assert list(prompts(tokenizer, 30)) == first
