"""Which tokens of a row are learned: read back as text, they are what the assistant would write, and nothing else."""

import json

import numpy as np
import pytest

from rewards.score import Score
from rlzero.config.rl import Reward
from rlzero.config.sft import SftConfig
from rlzero.data import dump
from rlzero.data.examples import load_examples, load_sft_tokenizer
from rlzero.data.prompts import R1_ZERO_TEMPLATE
from rlzero.data.sources import DataError
from rlzero.examples.countdown import text as base_text
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like those of reasoning models: the thoughts of all but the last answer are dropped.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "<think>1+1</think>2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "<think>2+2</think>4"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the demo's tokenizer, a chat's markers added."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = base_text.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


class Reader:
    """Reads rows the way a run would."""

    def __init__(self, folder, tmp_path):
        self.folder, self.tmp_path = folder, tmp_path

    def __call__(self, rows, chat=None, **data):
        source = self.tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.source(str(source), chat, **data)

    def pair(self, prompt, completion):
        return self([{"prompt": prompt, "completion": completion}], template="none")

    def source(self, source, chat=None, **data):
        if chat is not None:
            (self.tmp_path / "chat.jinja").write_text(chat)
            data["chat_template"] = str(self.tmp_path / "chat.jinja")
        config = SftConfig(
            policy={"path": str(self.folder)}, data={"train": source, **data}, rows_per_step=4,
            tokens_per_micro_batch=data.get("max_tokens", 4096),
        )  # fmt: skip
        self.tokenizer = load_sft_tokenizer(config)
        return load_examples(config, self.tokenizer)[0]

    def learned(self, example):
        """Every run of learned tokens, as text."""
        edges = np.flatnonzero(np.diff([False, *example.learned, False]))
        return [self.tokenizer.decode(example.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.fixture
def read(folder, tmp_path):
    return Reader(folder, tmp_path)


ANSWERS = ["<think>1+1</think>2<|im_end|>", "<think>2+2</think>4<|im_end|>"]


def test_of_a_conversation_the_assistants_turns_and_their_ends_are_learned(read):
    (example,) = read([{"messages": TURNS}])
    assert read.learned(example) == ANSWERS
    whole = read.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert read.tokenizer.decode(example.tokens) == whole.rstrip("\n")  # nothing is kept behind the last token learned


def test_prompt_tokens_are_those_that_the_policy_is_given_when_it_writes(read):
    (example,) = read([{"messages": TURNS}])
    before = read.tokenizer.apply_chat_template(TURNS[:4], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert example.tokens[: len(before)].tolist() == before
    assert not example.learned[len(before) - 1] and example.learned[len(before) :].all()


def test_a_conversation_that_ends_with_the_user_teaches_its_answers_only(read):
    (example,) = read([{"messages": TURNS[:4]}])
    assert read.learned(example) == ANSWERS[:1]
    assert read.tokenizer.decode(example.tokens).endswith("2<|im_end|>")


def test_loss_on_all_learns_the_prompts_too(read):
    (example,) = read([{"messages": TURNS}], loss_on="all")
    assert example.learned.all()
    (pair,) = read([{"prompt": "a", "completion": " b"}], template="none", loss_on="all")
    assert pair.learned.all() and pair.sample.loss_tokens == len(pair.tokens) - 1  # the first has nothing before it


def test_a_template_that_is_not_prefix_stable_is_an_error_that_says_where(read):
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template is not prefix-stable: up to message 3 alone"):
        read([{"messages": TURNS}], FORGETFUL)
    assert read.learned(read([{"messages": TURNS[:3]}], FORGETFUL)[0]) == ANSWERS[:1]  # one answer a row is fine


def test_a_template_that_marks_the_assistants_turns_decides_itself(read):
    (example,) = read([{"messages": TURNS}], MARKED, partial_answers="learn")
    assert read.learned(example) == ["2<|im_end|>", ANSWERS[1]]


def test_question_and_answer_become_a_conversation(read):
    pair, lists, turns = read(
        [
            {"prompt": "What is 1+1?", "completion": "2"},
            {"prompt": TURNS[:2], "completion": [{"role": "assistant", "content": "2"}]},
            {"messages": [TURNS[1], {"role": "assistant", "content": "2"}]},
        ]
    )
    assert pair.tokens.tolist() == turns.tokens.tolist() and pair.learned.tolist() == turns.learned.tolist()
    assert read.learned(pair) == read.learned(lists) == ["2<|im_end|>"]
    assert "Be brief." in read.tokenizer.decode(lists.tokens)


def test_the_r1_zero_template_stands_before_the_completion_and_eos_after_it(read):
    (example,) = read([{"prompt": "Make 3.", "completion": " <think>x</think> <answer>3</answer>"}], template="r1-zero")
    prompt = read.tokenizer(R1_ZERO_TEMPLATE.format(prompt="Make 3."))["input_ids"]
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert read.learned(example) == [" <think>x</think> <answer>3</answer>" + read.tokenizer.eos_token]


def test_text_is_learned_whole_and_ended(read):
    (example,) = read([{"text": "User: 12 Assistant: 13"}])
    assert read.learned(example) == ["User: 12 Assistant: 13" + read.tokenizer.eos_token]


def test_the_border_is_between_tokens_where_the_tokenizer_would_join_them(read):
    """`1` and `2` are one token, 12, when they stand together; a policy that is given `1` would write `2`."""
    (example,) = read.pair("=1", "2")
    assert read.learned(example) == ["2" + read.tokenizer.eos_token]
    assert example.tokens.tolist() == [
        *read.tokenizer("=1")["input_ids"], *read.tokenizer("2")["input_ids"], read.tokenizer.eos_token_id,
    ]  # fmt: skip
    assert len(read.tokenizer("=12")["input_ids"]) == 2


def test_a_tokenizer_that_puts_spaces_before_words_cannot_cut_everywhere(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁A:", "▁hello", "▁"]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    read = Reader(tmp_path, tmp_path)
    assert read.pair("A:", " hello")[0].tokens.tolist() == [2, 3, 1]
    with pytest.raises(DataError, match="rows.jsonl:1: no border between tokens where the answer begins"):
        read.pair("A: ", "hello")


# --- lengths, and rows with nothing to learn -------------------------------------------------------------------------

LONG = {"prompt": "1 2 3", "completion": " 4 5 6 7 8 9"}


def test_rows_that_are_too_long_are_named(read):
    with pytest.raises(DataError, match=r"1 of 2 rows are longer than 8 tokens(.|\n)*rows.jsonl:2: 18 tokens"):
        read([{"prompt": "1", "completion": "2"}, LONG], template="none", max_tokens=8)


def test_rows_that_are_too_long_are_truncated_or_dropped_by_choice_and_counted(read):
    rows = [{"prompt": "1", "completion": "2"}, LONG, {"prompt": "1 2 3 4 5 6", "completion": " 7"}]
    whole = read(rows, template="none")
    cut = read(rows, template="none", max_tokens=8, too_long="truncate")
    assert [len(row.tokens) for row in whole] == [3, 18, 14] and cut.counts == {"truncated": 2, "dropped": 1}
    assert cut[1].tokens.tolist() == whole[1].tokens[:8].tolist()
    assert cut[1].learned.tolist() == whole[1].learned[:8].tolist()
    dropped = read(rows, template="none", max_tokens=8, too_long="drop")
    assert [len(row.tokens) for row in dropped] == [3] and dropped.counts == {"dropped": 2}


def test_a_truncated_row_keeps_no_prompt_behind_its_last_answer(read):
    (whole,) = read([{"messages": TURNS}])
    first = int(np.flatnonzero(np.diff([*whole.learned, False]))[1])  # the last token of the first answer
    (cut,) = read([{"messages": TURNS}], max_tokens=first + 6, too_long="truncate")
    assert read.learned(cut) == ANSWERS[:1] and len(cut.tokens) == first + 1


def test_a_row_whose_answer_is_cut_off_whole_is_dropped_and_named(read, caplog):
    read([{"prompt": "1", "completion": "2"}, LONG], template="none", max_tokens=5, too_long="truncate")
    assert "rows.jsonl:2: nothing to learn is left after truncation" in caplog.text


def test_rows_without_a_token_to_learn_are_named(read):
    with pytest.raises(DataError, match=r"1 of 2 rows have no token to learn(.|\n)*rows.jsonl:2"):
        read([{"messages": TURNS}, {"messages": TURNS[:2]}])
    with pytest.raises(DataError, match=r"1 of 1 rows have no token to learn(.|\n)*rows.jsonl:1"):
        read.pair("1", "")


def test_a_token_that_a_new_policy_has_not_is_an_error(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "!"}\n{"text": "a 199"}\n')
    policy = {"init": {"vocab_size": 60}, "tokenizer": str(folder)}
    config = SftConfig(policy=policy, data={"train": str(tmp_path / "rows.jsonl")}, rows_per_step=1)
    with pytest.raises(DataError, match=r"rows.jsonl:1: token \d+, but the policy's vocabulary has 60 tokens"):
        load_examples(config, load_sft_tokenizer(config))


def test_the_first_kind_that_a_rows_columns_make_is_taken(read):
    rows = [{"prompt": "1", "text": "2 3"}, {"prompt": "1", "completion": "2", "text": "3"}]
    text, pair = read(rows, template="none")
    assert read.learned(text) == ["2 3" + read.tokenizer.eos_token] and read.learned(pair)[0].startswith("2")


def test_nothing_left_is_an_error(read):
    with pytest.raises(DataError, match="no row is left to learn from .1 dropped"):
        read([LONG], template="none", max_tokens=4, too_long="drop")


# --- dumps -----------------------------------------------------------------------------------------------------------


def group(tokenizer, completions, prompt="Make 3."):
    text = R1_ZERO_TEMPLATE.format(prompt=prompt)
    tokens = tuple(tokenizer(text)["input_ids"])
    rollouts, scores = [], []
    for sample, (completion, finish, verdict) in enumerate(completions):
        ids = [*tokenizer(completion)["input_ids"], *([tokenizer.eos_token_id] if finish == "stop" else [])]
        n = len(ids)
        rollouts.append(Rollout("0/a", sample, tokens, ids, [-1.0] * n, [(0, n)], finish, completion))
        scores.append([None, Score(1.0, "correct"), Score(float(verdict == "correct"), verdict)])
    return Group(Prompt("a", text, tokens, {"prompt": prompt}), rollouts, scores)


# The reward of form stands first; the heavier one decides what is correct, as in an evaluation.
REWARDS = [Reward(fn="m:other", weight=9), Reward(fn="m:form", weight=0.1), Reward(fn="m:task")]
COMPLETIONS = [
    (" <think>x</think> 3", "stop", "correct"), (" 4", "stop", "wrong"), (" 3 and", "length", "correct"),
]  # fmt: skip


def test_of_a_dump_the_correct_and_finished_completions_are_learned_as_they_were_sampled(read, folder, tmp_path):
    tokenizer = load_sft_tokenizer(SftConfig(policy={"path": str(folder)}, data={"train": "x"}, rows_per_step=1))
    written = group(tokenizer, COMPLETIONS)
    dump.save(tmp_path / "dump.jsonl", [written], REWARDS, step=3)
    examples = read.source(str(tmp_path / "dump.jsonl"))
    (example,) = examples
    rollout = written.rollouts[0]
    assert example.tokens.tolist() == [*rollout.prompt_tokens, *rollout.tokens]
    assert example.learned.sum() == len(rollout.tokens) and example.learned[len(rollout.prompt_tokens) :].all()
    assert examples.counts == {"not finished": 1, "not correct": 1}
    assert len(read.source(str(tmp_path / "dump.jsonl"), keep="all")) == 2


def test_a_dump_of_another_tokenizer_is_encoded_anew(read, folder, tmp_path, caplog):
    tokenizer = load_sft_tokenizer(SftConfig(policy={"path": str(folder)}, data={"train": "x"}, rows_per_step=1))
    other = group(tokenizer, COMPLETIONS[:1])
    for rollout in other.rollouts:  # other ids for the same text
        rollout.prompt_tokens = tuple(t + 1 for t in rollout.prompt_tokens)
    other = Group(Prompt("a", other.prompt.text, other.rollouts[0].prompt_tokens, {}), other.rollouts, other.scores)
    dump.save(tmp_path / "dump.jsonl", [other], REWARDS)
    (example,) = read.source(str(tmp_path / "dump.jsonl"))
    assert "another tokenizer" in caplog.text
    assert read.learned(example) == [COMPLETIONS[0][0] + tokenizer.eos_token]
    assert read.tokenizer.decode(example.tokens).startswith(other.prompt.text)


def test_a_dump_without_a_correct_completion_says_so(read, folder, tmp_path):
    tokenizer = load_sft_tokenizer(SftConfig(policy={"path": str(folder)}, data={"train": "x"}, rows_per_step=1))
    dump.save(tmp_path / "dump.jsonl", [group(tokenizer, COMPLETIONS[1:])], REWARDS)
    with pytest.raises(DataError, match="no completion is left to learn from .1 not finished, 1 not correct"):
        read.source(str(tmp_path / "dump.jsonl"))


# --- rows that others wrote ------------------------------------------------------------------------------------------

CUTTING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
ASKED, SAID = {"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize("template", [CUTTING, MARKED.replace("loop.last", "false")], ids=["plain", "marked"])
def test_a_template_that_cuts_thoughts_is_refused_unless_asked_for(read, template):
    thought = {"role": "assistant", "content": "<think>one and one are\ntwo</think>2"}
    with pytest.raises(DataError, match=r"1 of 2 rows(.|\n)*rows.jsonl:1: \d+% of its answers is learned"):
        read([{"messages": [ASKED, thought]}, {"messages": [ASKED, SAID]}], template)
    examples = read([{"messages": [ASKED, thought]}], template, partial_answers="learn")
    assert read.learned(examples[0]) == ["2<|im_end|>"] and 0 < examples.answers_learned < 0.25


def test_thoughts_that_stand_apart_and_are_not_written_are_missed_too(read):
    apart = {**SAID, "reasoning_content": "one and one are two"}
    with pytest.raises(DataError, match=r"rows.jsonl:1: 17% of its answers is learned"):
        read([{"messages": [ASKED, apart]}])


def test_a_template_may_change_the_space_around_an_answer(read):
    spaced = CHATML.replace("{{ m.content }}", "{{ m.content.replace('</think>', '\n</think>\n\n') | trim }}")
    (example,) = read([{"messages": [ASKED, {"role": "assistant", "content": "<think>a</think>2 \n"}]}], spaced)
    assert read.learned(example) == ["<think>a\n</think>\n\n2<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"messages": [{**ASKED, "tool_calls": None, "name": None}, {**SAID, "tool_calls": [], "name": None}]},
        {"messages": json.dumps([ASKED, SAID])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 1+1?"}]}, SAID]},
        {"conversations": [{"from": "human", "value": "What is 1+1?"}, {"from": "gpt", "value": "2"}]},
        {"conversations": [ASKED, SAID], "messages": None},
        {"prompt": "What is 1+1?", "response": "2"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"instruction": "What is 1+1?", "input": "", "output": "2"},
        {"instruction": "What is 1+1?", "input": None, "output": "2", "text": "all of it"},
        {"query": "What is 1+1?", "response": "2"},
    ],
    ids=lambda row: "+".join(row),
)  # fmt: skip
def test_rows_as_others_write_them_become_the_same_conversation(read, row):
    (expected,) = read([{"messages": [ASKED, SAID]}])
    (example,) = read([row])
    assert example.tokens.tolist() == expected.tokens.tolist() and example.learned.tolist() == expected.learned.tolist()


def test_system_texts_inputs_and_histories_stand_before_the_question(read):
    sharegpt, alpaca = read(
        [
            {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}], "system": "Be brief."},
            {"instruction": "Add.", "input": "1 and 1", "output": "2", "history": [["0", "1"]], "system": "Be brief."},
        ]
    )
    decode = read.tokenizer.decode
    assert decode(sharegpt.tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1<|im_end|>")
    assert "user\n0<|im_end|>\n<|im_start|>assistant\n1<|im_end|>" in decode(alpaca.tokens)
    assert "user\nAdd.\n\n1 and 1<|im_end|>" in decode(alpaca.tokens)


def test_system_and_suffix_of_the_config_stand_around_a_question(read):
    (example,) = read([{"prompt": "1+1?", "completion": "2"}], system="Be brief.", suffix=" Box it.")
    assert read.tokenizer.decode(example.tokens).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1? Box it.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a \ud800 b"}, SAID]}, r"half a character"),
        ({"prompt": "a", "completion": "\udfff"}, r"half a character"),
        ({"text": "\ud800"}, r"half a character"),
        ({"conversations": [{"from": "alien", "value": "1"}]}, r"a message is from 'alien'"),
        ({"messages": [{"content": "1"}]}, r"a message has no `role`"),
        ({"messages": "no list"}, r"expected a list of messages"),
        ({"question": "1", "answer": "2"}, r"none of the columns 'messages'(.*)found question, answer; set"),
        ({"messages": [{"role": "system", "content": "x"}, ASKED, SAID]}, r"System role not supported; write the row"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named_with_its_cause(read, row, message):
    refusal = "{{ raise_exception('System role not supported') }}"
    gemma = "{% if messages[0].role == 'system' %}" + refusal + "{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be learned from\n.*rows.jsonl:2: .*" + message):
        read([{"messages": [ASKED, SAID]}, row], gemma)


def test_an_empty_answer_is_an_error_in_a_chat_too(read):
    rows = [{"messages": [ASKED, {"role": "assistant", "content": text}]} for text in ("2", " \n", None)]
    with pytest.raises(DataError, match=r"2 of 3 rows have no token to learn(.|\n)*rows.jsonl:2\n.*rows.jsonl:3"):
        read(rows)
    with pytest.raises(DataError, match=r"1 of 1 rows have no token to learn"):
        read([{"prompt": "1", "completion": None}])
