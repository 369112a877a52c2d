"""Rows to learn from: conversations, question and answer, plain text, and dumps of rollouts, of a length that fits.

Whatever is wrong with a row is said with its file and line before anything starts (`DataError`, exit code 2).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlzero.config.sft import SftConfig, SftData, policy_field
from rlzero.data import dump
from rlzero.data.chat import (
    GENERATION,
    Example,
    TextRow,
    chat_segments,
    encode,
    marked_by_template,
    render,
    special_tokens,
    tokenize,
    trimmed,
)
from rlzero.data.prompts import DataError, Row, Split, _listed, load_rows, load_tokenizer, prompt_text
from rlzero.eval.evaluate import is_correct

logger = logging.getLogger(__name__)

CHUNK = 512  # rows that a tokenizer gets at once: it shares them out to threads


@dataclass
class Examples(Sequence[Example]):
    """All rows of a set, in order. `counts` says what became of others: truncated, dropped, not correct, ..."""

    rows: list[Example]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.rows[index]

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def learned(self) -> int:
        return sum(int(row.learned[1:].sum()) for row in self.rows)

    def ends(self, tokenizer: Any) -> set[int]:
        """The special tokens that end what is learned: in writing, they will end the policy's turns."""
        last = [row.tokens[row.learned & ~np.append(row.learned[1:], False)] for row in self.rows]
        special = special_tokens(tokenizer) | set(tokenizer.added_tokens_decoder)
        return special & {int(token) for tokens in last for token in tokens}

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and masks in their order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row.tokens).to_bytes(8, "little") + row.tokens.tobytes() + row.learned.tobytes())
        return digest.hexdigest()[:16]


Progress = Callable[[int, int], None]


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
    kept = [row for i, row in enumerate(train.rows) if i not in chosen]
    return Examples(kept, train.counts), Examples([train.rows[i] for i in sorted(chosen)])


def load_sft_tokenizer(config: SftConfig) -> Any:
    """The policy's tokenizer, with `data.chat_template` where that is set. Raises `DataError`."""
    tokenizer = load_tokenizer(str(config.policy.tokenizer_folder))
    if config.data.chat_template is not None:
        try:
            tokenizer.chat_template = Path(config.data.chat_template).read_text()
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
    if is_dump(source):
        examples, counts = from_dump(source, config.data, tokenizer)
    else:
        rows = load_rows(source, params, split, seed=config.seed if split == "train" else 0)
        examples, counts = list(examples_of(rows, config.data, tokenizer, progress)), {}
    _check_vocabulary(examples, config)
    return Examples(_fit(examples, config, source, counts), counts)


# --- rows of text ----------------------------------------------------------------------------------------------------


def examples_of(rows: Sequence[Row], data: SftData, tokenizer: Any, progress: Progress) -> Iterator[Example]:
    """The examples of `rows`, in order. Raises `DataError`."""
    _check_columns(rows, data)
    marks = data.loss_on == "completion" and bool(GENERATION.search(str(tokenizer.chat_template or "")))
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        by_template = marks and data.template == "chat"
        made = [
            marked_by_template(tokenizer, *_conversation(row, data), row.where)
            if by_template and _kind(row, data) in ("conversation", "pair")
            else None
            for row in chunk
        ]
        texts = [_as_text(row, data, tokenizer) for row, done in zip(chunk, made, strict=True) if done is None]
        encoded = iter(tokenize(texts, tokenizer))
        for example in made:
            example = next(encoded) if example is None else example
            if data.loss_on == "all":
                example = Example(example.tokens, np.ones(len(example.tokens), bool), example.where)
            yield example
        progress(min(start + CHUNK, len(rows)), len(rows))


def _kind(row: Row, data: SftData) -> Literal["conversation", "pair", "text"] | None:
    """What the columns of a row make it; the first that fits."""
    if data.messages_column in row.values:
        return "conversation"
    if data.prompt_column in row.values and data.completion_column in row.values:
        return "pair"
    return "text" if data.text_column in row.values else None


def _check_columns(rows: Sequence[Row], data: SftData) -> None:
    pair = f"'{data.prompt_column}' and '{data.completion_column}'"
    bad = [
        f"{row.where}: found {', '.join(map(str, row.values)) or 'an empty object'}"
        for row in rows
        if _kind(row, data) is None
    ]
    if bad:
        raise DataError(
            _listed(
                f"{len(bad)} of {len(rows)} rows have none of the columns '{data.messages_column}', or {pair}, or "
                f"'{data.text_column}'; set data.messages_column, data.prompt_column, data.completion_column or "
                "data.text_column",
                bad,
            )
        )


def _conversation(row: Row, data: SftData) -> tuple[list[dict], list | None]:
    """The messages of a row and its tools: its own, or those made of prompt and completion."""
    values = row.values
    if data.messages_column in values:
        messages = values[data.messages_column]
    else:
        prompt, completion = values[data.prompt_column], values[data.completion_column]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(before, list) or not isinstance(after, list):
            raise DataError(
                f"{row.where}: '{data.prompt_column}' and '{data.completion_column}' must be texts or lists of "
                f"messages, found {type(prompt).__name__} and {type(completion).__name__}"
            )
        messages = [*before, *after]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise DataError(
            f"{row.where}: '{data.messages_column}' must be a list of messages, each with `role` and `content`, found "
            f"{json.dumps(messages, default=str)[:120]}"
        )
    return messages, values.get("tools")


def _as_text(row: Row, data: SftData, tokenizer: Any) -> TextRow:
    values, kind = row.values, _kind(row, data)
    if kind == "text":
        text = values[data.text_column]
        if not isinstance(text, str):
            raise DataError(f"{row.where}: column '{data.text_column}' must hold a text, found {text!r:.80}")
        return TextRow([(text, True)], True, row.where)
    if data.template == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                "data.template: chat, but the policy's tokenizer has no chat template; name one with "
                "data.chat_template, or use r1-zero or none"
            )
        messages, tools = _conversation(row, data)
        if data.loss_on == "all":
            return TextRow([(render(tokenizer, messages, tools, False, row.where), True)], False, row.where)
        return TextRow(chat_segments(tokenizer, messages, tools, row.where), False, row.where)
    if kind == "conversation":
        raise DataError(f"{row.where}: a conversation ('{data.messages_column}') needs data.template=chat")
    prompt, completion = values[data.prompt_column], values[data.completion_column]
    if not isinstance(completion, str):
        raise DataError(
            f"{row.where}: column '{data.completion_column}' must hold a text, found {type(completion).__name__}; a "
            "list of messages needs data.template=chat"
        )
    return TextRow(
        [(prompt_text(prompt, data.template, tokenizer, row.where), False), (completion, True)], True, row.where
    )


# --- lengths ---------------------------------------------------------------------------------------------------------


def _fit(examples: list[Example], config: SftConfig, source: str, counts: dict[str, int]) -> list[Example]:
    """`examples` without those that are too long, as `data.too_long` says; all have something to learn."""
    longest, choice = config.longest_row, config.data.too_long
    if nothing := [row.where for row in examples if not row.learned[1:].any()]:
        raise DataError(
            _listed(
                f"{len(nothing)} of {len(examples)} rows have no token to learn (no assistant's turn, or an empty "
                "answer); take them out",
                nothing,
            )
        )
    long = [f"{row.where}: {len(row.tokens)} tokens" for row in examples if len(row.tokens) > longest]
    if long and choice == "error":
        raise DataError(
            _listed(
                f"{len(long)} of {len(examples)} rows are longer than {longest} tokens (the least of data.max_tokens, "
                "the policy's context and tokens_per_micro_batch); raise them, or set data.too_long=truncate or drop",
                long,
            )
        )
    kept = []
    for row in examples:
        if len(row.tokens) > longest and choice == "truncate":
            row = trimmed(row.tokens[:longest], row.learned[:longest], row.where)
            counts["truncated"] = counts.get("truncated", 0) + 1
            if not row.learned[1:].any():
                counts["dropped"] = counts.get("dropped", 0) + 1
                logger.warning("%s: nothing to learn is left after truncation; dropped", row.where)
                continue
        elif len(row.tokens) > longest:
            counts["dropped"] = counts.get("dropped", 0) + 1
            continue
        kept.append(row)
    if not kept:
        raise DataError(f"{source}: no row is left to learn from ({_said(counts) or 'the data set is empty'})")
    return kept


def _check_vocabulary(examples: list[Example], config: SftConfig) -> None:
    size = policy_field(config.policy, "vocab_size")
    for row in examples if size is not None else ():
        if (highest := int(row.tokens.max(initial=0))) >= size:
            raise DataError(
                f"{row.where}: token {highest}, but the policy's vocabulary has {size} tokens: is the tokenizer (or "
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


def from_dump(path: str, data: SftData, tokenizer: Any) -> tuple[list[Example], dict[str, int]]:
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
    if texts:
        examples = list(tokenize(texts, tokenizer))
    if not examples:
        raise DataError(
            f"{path}: no completion is left to learn from ({_said(counts)}); data.keep=all takes wrong ones"
        )
    if data.loss_on == "all":
        examples = [Example(row.tokens, np.ones(len(row.tokens), bool), row.where) for row in examples]
    return examples, counts


def _from(tokenizer: Any, tokens: Sequence[int], text: str) -> bool:
    """Whether `tokens` are this tokenizer's of `text`, with or without the special tokens it adds."""
    return any(list(tokens) == ids for special in (True, False) for ids in encode(tokenizer, [text], special))
