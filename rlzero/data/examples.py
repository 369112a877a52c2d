"""Rows to learn from: conversations, question and answer, plain text, and dumps of rollouts, of a length that fits.

Whatever is wrong with a row is said with its file and line before anything starts (`DataError`, exit code 2).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from rewards.json_form import dumps
from rlzero.config.sft import SftConfig, SftData, policy_field
from rlzero.data import dump
from rlzero.data.chat import (
    GENERATION,
    Example,
    TextRow,
    chat_segments,
    encode,
    learned_share,
    marked_by_template,
    messages_of,
    render,
    special_tokens,
    tokenize,
    tools_of,
    trimmed,
    valid,
)
from rlzero.data.prepare import Progress, Result, Results, key_of, prepared, tokenizer_identity
from rlzero.data.prompts import Template, load_tokenizer
from rlzero.data.sources import DataError, Row, Split, digest, listed, load_rows
from rlzero.eval.evaluate import is_correct

logger = logging.getLogger(__name__)

# Columns that make a question and its answer, beside those that the config names.
PAIRS = [("prompt", "response"), ("instruction", "output"), ("instruction", "response"), ("query", "response")]
CONVERSATIONS = ("conversations", "conversation")  # ShareGPT's, beside the column that the config names


class Examples(Sequence[Example]):
    """The rows of a set that are learned, in order. `counts` says what became of others: truncated, dropped, not
    correct, ...; `answers_learned` how much of the answers' words is learned, where the template cuts some."""

    def __init__(self, results: Results, lengths: dict[int, int], counts: dict[str, int] | None = None):
        self._results, self._lengths = results, lengths  # row -> tokens of it that are taken
        self._rows = list(lengths)
        self.counts = counts or {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        row = self._rows[index]
        length, value = self._lengths[row], self._results.value
        return Example(value("tokens", row)[:length], value("learned", row)[:length], value("where", row))

    def part(self, indices: Sequence[int]) -> Examples:
        """Those at `indices`, in that order."""
        rows = [self._rows[i] for i in indices]
        return Examples(self._results, {row: self._lengths[row] for row in rows}, self.counts)

    @property
    def lengths(self) -> list[int]:
        return list(self._lengths.values())

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def learned(self) -> int:
        whole, full = self._results.arrays["learns"], self._results.lengths("tokens")
        cut = (self[i] for i, row in enumerate(self._rows) if self._lengths[row] < full[row])
        cut_ = [int(row.learned[1:].sum()) for row in cut]
        return sum(cut_) + int(sum(whole[row] for row in self._rows if self._lengths[row] == full[row]))

    def ends(self, tokenizer: Any) -> set[int]:
        """The special tokens that end what is learned: in writing, they will end the policy's turns."""
        tokens, learned = self._results.arrays["tokens"], self._results.arrays["learned"]
        goes_on = np.append(learned[1:], False)
        goes_on[self._results.arrays["tokens.ends"] - 1] = False
        special = special_tokens(tokenizer) | set(tokenizer.added_tokens_decoder)
        return special & set(np.unique(tokens[learned & ~goes_on]).tolist())

    @property
    def answers_learned(self) -> float:
        shares = self._results.arrays["share"]
        return float(shares[self._rows].mean()) if self._rows else 1.0

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and masks in their order."""
        found = hashlib.sha256()
        for row in self:
            found.update(len(row.tokens).to_bytes(8, "little") + row.tokens.tobytes() + row.learned.tobytes())
        return found.hexdigest()[:16]


def load_examples(
    config: SftConfig, tokenizer: Any, progress: Progress = lambda done, total: None
) -> tuple[Examples, Examples | None]:
    """The rows to train on and the held-out ones (None where there are none). Raises `DataError`."""
    data = config.data
    train = read(config, tokenizer, data.train, data.params, "train", progress)
    if data.evaluation is not None:
        params = {**data.params, **data.evaluation_params}
        return train, read(config, tokenizer, data.evaluation, params, "evaluation", progress)
    if not data.held_out:
        return train, None
    if data.held_out >= len(train):
        raise DataError(f"data.held_out: {data.held_out}, but {data.train} has {len(train)} rows; leave some to train")
    chosen = set(random.Random("held out").sample(range(len(train)), data.held_out))
    return train.part([i for i in range(len(train)) if i not in chosen]), train.part(sorted(chosen))


def load_sft_tokenizer(config: SftConfig) -> Any:
    """The policy's tokenizer, with `data.chat_template` where that is set. Raises `DataError`."""
    tokenizer = load_tokenizer(str(config.policy.tokenizer_folder))
    if config.data.chat_template is not None:
        try:
            tokenizer.chat_template = Path(config.data.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"data.chat_template: {config.data.chat_template} cannot be read: {error.strerror}"
            ) from error
    return tokenizer


def read(
    config: SftConfig, tokenizer: Any, source: str, params: dict[str, Any], split: Split, progress: Progress
) -> Examples:
    """Every row of `source` as an `Example` of at most `config.longest_row` tokens. Raises `DataError` that names rows
    which are too long (unless they are truncated or dropped), have nothing to learn or lack a column."""
    data, counts = config.data, {}
    if is_dump(source):
        results, counts = from_dump(source, data, tokenizer)
    else:

        def rows() -> list[Row]:
            return load_rows(source, params, split, seed=config.seed if split == "train" else 0)

        content, identity = digest(source), tokenizer_identity(tokenizer)
        if content is None or params:  # not a file: the rows themselves say what they are
            made = rows()
            content, rows = hashlib.sha256(dumps([row.values for row in made]).encode()).hexdigest(), lambda: made
        shown = [data.messages_column, data.prompt_column, data.completion_column, data.text_column, data.loss_on]
        key = key_of("examples", source, content, shown, vars(Template.of(data)), identity) if identity else None
        results = prepared(rows, partial(make_results, data=data, tokenizer=tokenizer), key, progress)
    _check(results, data)
    return _fit(results, config, source, counts)


# --- rows of text ----------------------------------------------------------------------------------------------------


def _result(example: Example | DataError, where: str, share: float = 1.0) -> Result:
    """What one row becomes: its tokens, which are learned, what share of its answers' words that is, its place, and
    what is wrong with it."""
    problem = str(example).removeprefix(f"{where}: ") if isinstance(example, DataError) else ""
    if isinstance(example, DataError):
        example = _nothing(where)
    return {
        "tokens": example.tokens,
        "learned": example.learned,
        "learns": example.learned[1:].sum(keepdims=True, dtype=np.int32),  # nothing stands before the first token
        "share": np.array([share], np.float32),
        "where": where,
        "problem": problem,
    }


def make_results(rows: Sequence[Row], data: SftData, tokenizer: Any) -> list[Result]:
    """The examples of `rows`, in order, with what is wrong with those that cannot be learned."""
    marks = data.loss_on == "completion" and bool(GENERATION.search(str(tokenizer.chat_template or "")))
    made: list[tuple[Example | DataError | TextRow, float]] = []
    for row in rows:
        try:
            made.append(_example(row, data, tokenizer, marks))
        except DataError as error:
            made.append((error, 1.0))
    encoded = iter(tokenize([item for item, _ in made if isinstance(item, TextRow)], tokenizer))
    results = []
    for row, (item, share) in zip(rows, made, strict=True):
        example = next(encoded) if isinstance(item, TextRow) else item
        results.append(_result(_learned_whole(example) if data.loss_on == "all" else example, row.where, share))
    return results


def _nothing(where: str) -> Example:
    return Example(np.zeros(0, np.int32), np.zeros(0, bool), where)


def _learned_whole(example: Example | DataError) -> Example | DataError:
    return example if isinstance(example, DataError) else replace(example, learned=np.ones(len(example.tokens), bool))


def _example(row: Row, data: SftData, tokenizer: Any, marks: bool) -> tuple[Example | TextRow, float]:
    """A row as text or, where the template marks what is learned, as tokens; and the share of its answers' words that
    the template keeps. Raises `DataError`."""
    values, where = row.values, row.where
    system = values.get("system")
    template = Template(data.template, system if system and isinstance(system, str) else data.system, data.suffix)
    conversation, pair = _conversation_of(values, data), _pair_of(values, data)
    if conversation is None and pair is None:
        if data.text_column not in values:
            raise DataError(
                f"{where}: none of the columns '{data.messages_column}', or '{data.prompt_column}' and "
                f"'{data.completion_column}', or '{data.text_column}', nor ShareGPT's or Alpaca's; found "
                f"{', '.join(map(str, values)) or 'an empty object'}; set data.messages_column, data.prompt_column, "
                "data.completion_column or data.text_column"
            )
        text = values[data.text_column]
        if not isinstance(text, str):
            raise DataError(f"{where}: column '{data.text_column}' must hold a text, found {text!r:.80}")
        return TextRow([(valid(text, where), True)], True, where), 1.0
    if data.template == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                f"{where}: data.template is chat, but the policy's tokenizer has no chat template; name one with "
                "data.chat_template, or use r1-zero or none"
            )
        if conversation is None:
            before = template.messages(pair[0], where)
            after = pair[1] if isinstance(pair[1], list) else [{"role": "assistant", "content": pair[1]}]
            messages = [*before, *messages_of(after, where)]
        else:
            is_json = isinstance(conversation, str)
            messages = template.messages(messages_of(conversation, where) if is_json else conversation, where)
        tools = tools_of(values.get("tools"))
        if any(message["role"] == "assistant" and not _says(message) for message in messages):
            return _nothing(where), 1.0  # said with the rows that learn nothing
        if marks:
            example = marked_by_template(tokenizer, messages, tools, where)
            return example, learned_share(messages, tokenizer.decode(example.tokens[example.learned]))
        if data.loss_on == "all":
            text = render(tokenizer, messages, tools, False, where)
            return TextRow([(text, True)], False, where), learned_share(messages, text)
        segments = chat_segments(tokenizer, messages, tools, where)
        learned = "".join(text for text, is_learned in segments if is_learned)
        return TextRow(segments, False, where), learned_share(messages, learned)
    if pair is None:
        raise DataError(f"{where}: a conversation ('{data.messages_column}') needs data.template=chat")
    prompt, completion = pair
    if not isinstance(completion, str):
        raise DataError(
            f"{where}: column '{data.completion_column}' must hold a text, found {type(completion).__name__}; a "
            "list of messages needs data.template=chat"
        )
    text = template.text(prompt, tokenizer, where)
    return TextRow([(text, False), (valid(completion, where), True)], True, where), 1.0


def _conversation_of(values: dict[str, Any], data: SftData) -> Any:
    """The messages of a row; None for rows of other kinds."""
    names = (data.messages_column, *CONVERSATIONS)
    return next((values[name] for name in names if values.get(name) is not None), None)


def _pair_of(values: dict[str, Any], data: SftData) -> tuple[Any, Any] | None:
    """The question and the answer of a row. Alpaca's `input` follows its instruction, its `history` goes before. None
    for rows of other kinds."""
    for asked, answered in ((data.prompt_column, data.completion_column), *PAIRS):
        if asked in values and answered in values:
            question, answer = values[asked], values[answered]
            if asked == "instruction" and values.get("input"):
                question = f"{question}\n\n{values['input']}"
            before: list[dict] = []
            for said, replied in values.get("history") or ():
                before += [{"role": "user", "content": said}, {"role": "assistant", "content": replied}]
            return [*before, {"role": "user", "content": question}] if before else question, answer or ""
    return None


def _says(message: dict) -> bool:
    content = message["content"]
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _check(results: Results, data: SftData) -> None:
    """Raises `DataError` for rows that cannot be learned from, and for answers that the template cuts."""
    problems: dict[str, list[str]] = {}
    for i in np.flatnonzero(results.lengths("problem")):
        problems.setdefault(results.value("problem", i), []).append(results.value("where", i))
    if problems:
        count = sum(map(len, problems.values()))
        more = {problem: f" (and {len(rows) - 1} more rows)" * (len(rows) > 1) for problem, rows in problems.items()}
        lines = [f"{rows[0]}{more[problem]}: {problem}" for problem, rows in problems.items()]
        raise DataError(listed(f"{count} of {len(results)} rows cannot be learned from", lines))
    shares = results.arrays["share"]
    cut = np.flatnonzero(shares < 1)
    if len(cut) and data.partial_answers == "error":
        lines = [f"{results.value('where', i)}: {shares[i]:.0%} of its answers is learned" for i in cut]
        raise DataError(
            listed(
                f"the chat template drops parts of the answers of {len(cut)} of {len(results)} rows (thoughts, most "
                f"likely): on average {shares[cut].mean():.0%} of their words would be learned; name a template that "
                "keeps them with data.chat_template, or set data.partial_answers=learn",
                lines,
            )
        )


# --- lengths ---------------------------------------------------------------------------------------------------------


def _fit(results: Results, config: SftConfig, source: str, counts: dict[str, int]) -> Examples:
    """The rows without those that are too long, as `data.too_long` says; all have something to learn."""
    longest, choice = config.longest_row, config.data.too_long
    lengths, count = results.lengths("tokens").tolist(), len(results)
    everything = Examples(results, dict(enumerate(lengths)))
    _check_vocabulary(everything, results, config)
    if nothing := [results.value("where", i) for i in np.flatnonzero(results.arrays["learns"] == 0)]:
        raise DataError(
            listed(
                f"{len(nothing)} of {count} rows have no token to learn (no assistant's turn, or an empty answer); "
                "take them out",
                nothing,
            )
        )
    long = [i for i, length in enumerate(lengths) if length > longest]
    if long and choice == "error":
        raise DataError(
            listed(
                f"{len(long)} of {count} rows are longer than {longest} tokens (the least of data.max_tokens, "
                "the policy's context and tokens_per_micro_batch); raise them, or set data.too_long=truncate or drop",
                [f"{results.value('where', i)}: {lengths[i]} tokens" for i in long],
            )
        )
    kept = dict(enumerate(lengths))
    for i in long:
        row = everything[i]
        row = trimmed(row.tokens[:longest], row.learned[:longest], row.where)
        if choice == "truncate":
            counts["truncated"] = counts.get("truncated", 0) + 1
            kept[i] = len(row.tokens)
            if row.learned[1:].any():
                continue
            logger.warning("%s: nothing to learn is left after truncation; dropped", row.where)
        counts["dropped"] = counts.get("dropped", 0) + 1
        del kept[i]
    if not kept:
        raise DataError(f"{source}: no row is left to learn from ({_said(counts) or 'the data set is empty'})")
    return Examples(results, kept, counts)


def _check_vocabulary(examples: Examples, results: Results, config: SftConfig) -> None:
    size = policy_field(config.policy, "vocab_size")
    if size is None or int(results.arrays["tokens"].max(initial=0)) < size:
        return
    row = next(row for row in examples if row.tokens.max(initial=0) >= size)
    raise DataError(
        f"{row.where}: token {row.tokens.max()}, but the policy's vocabulary has {size} tokens: is the tokenizer (or "
        "data.chat_template) another model's?"
    )


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


# --- dumps of rollouts -----------------------------------------------------------------------------------------------


def is_dump(source: str) -> bool:
    """Whether `source` is a file that `rlzero generate` or `rlzero eval --output` wrote."""
    try:
        with open(source, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):  # not a file, or not JSON lines: `load_rows` says what is wrong with it
        return False
    return isinstance(first, dict) and str(first.get("kind", "")).startswith("rlzero dump")


def from_dump(path: str, data: SftData, tokenizer: Any) -> tuple[Results, dict[str, int]]:
    """The completions of a dump (rejection sampling): the tokens as they were sampled where this tokenizer is the one
    that they came from, else prompt and completion encoded anew. Completions that were cut, and with keep: correct
    those that evaluation would not count as correct (`is_correct`), are left out and counted."""
    groups = dump.load(path)
    rewards = dump.load_rewards(path) if data.keep == "correct" else ()
    same = all(_from(tokenizer, group.prompt.tokens, group.prompt.text) for group in groups[:8])
    if not same:
        logger.warning("%s: was written with another tokenizer; its prompts and completions are encoded anew", path)
    counts = {"not finished": 0, "not correct": 0}
    examples, texts, enders = [], [], special_tokens(tokenizer)
    for line, group in enumerate(groups, start=2):
        for rollout, scores in zip(group.rollouts, group.scores, strict=True):
            where = f"{path}:{line} (sample {rollout.sample})"
            if rollout.finish_reason != "stop":
                counts["not finished"] += 1
            elif data.keep == "correct" and not is_correct(scores, rewards):
                counts["not correct"] += 1
            elif same:
                last = rollout.tokens[-1:]  # none of the text: the token that ended it; else it was a stop string
                ended = last and last[0] in enders and not rollout.text.endswith(tokenizer.decode(last))
                tokens = [*rollout.prompt_tokens, *rollout.tokens, *([] if ended else [tokenizer.eos_token_id])]
                learned = np.arange(len(tokens)) >= len(rollout.prompt_tokens)
                examples.append(Example(np.array(tokens, np.int32), learned, where))
            else:
                special = not str(group.prompt.text).startswith(str(tokenizer.bos_token))
                texts.append(TextRow([(group.prompt.text, False), (rollout.text, True)], special, where))
    wheres = [item.where for item in texts or examples]
    if texts:
        examples = list(tokenize(texts, tokenizer))
    if not examples:
        raise DataError(
            f"{path}: no completion is left to learn from ({_said(counts)}); data.keep=all takes wrong ones"
        )
    if data.loss_on == "all":
        examples = [_learned_whole(example) for example in examples]
    return Results.of([_result(example, where) for example, where in zip(examples, wheres, strict=True)]), counts


def _from(tokenizer: Any, tokens: Sequence[int], text: str) -> bool:
    """Whether `tokens` are this tokenizer's of `text`, with or without the special tokens it adds."""
    return any(list(tokens) == ids for special in (True, False) for ids in encode(tokenizer, [text], special))
