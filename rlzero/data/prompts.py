"""Rows -> a resumable stream of prompts.

A template turns a row into a prompt's text; the tokenizer turns the text into tokens; `PromptStream` hands the prompts
out, shuffled anew in every epoch, from a position that survives restarts. Whatever is wrong with a row is said with its
file and line before anything starts (`DataError`, exit code 2).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rewards.json_form import plain
from rewards.load import Reward, load_reward
from rlzero.config.rl import Config
from rlzero.data.chat import messages_of, render, valid
from rlzero.data.prepare import Progress, Result, key_of, prepared, tokenizer_identity
from rlzero.data.sources import DataError, Row, Split, listed, load_rows
from rollout.engine import Prompt
from rollout.tokenizer import encode_quoted, quoted, read_tokenizer, tokens_past_vocabulary, unquoted

logger = logging.getLogger(__name__)

# The conversation of R1-Zero (arXiv 2501.12948, table 1), retold. It ends where the assistant's turn begins, so that
# the model itself opens <think>.
R1_ZERO_TEMPLATE = (
    "User asks a question and Assistant solves it. Assistant first works through the problem, then gives the answer. "
    "The work stands inside <think> </think> and the answer inside <answer> </answer>, like this: "
    "<think> the work </think> <answer> the answer </answer>.\n"
    "User: {prompt}\n"
    "Assistant:"
)

# --- prompts ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer in folder `path`. Raises `DataError` where there is none or it has no EOS."""
    if not Path(path).is_dir():
        raise DataError(
            f"policy.path: {path}: no such folder (looked in {Path.cwd()}); expected the folder of a model. One of the "
            f"Hugging Face hub is had by `hf download {path} --local-dir FOLDER`"
        )
    try:
        tokenizer = read_tokenizer(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no tokenizer could be loaded: {str(error).splitlines()[0]}\n"
            "  expected a folder with tokenizer.json and tokenizer_config.json beside the policy's weights"
        ) from error
    check_tokenizer(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer: Any, path: str | Path) -> None:
    """Raises `DataError` for a tokenizer that could never end a completion, and for one that has more tokens than the
    model in its folder knows."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{path}: the tokenizer has no end-of-sequence token, so a completion could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    if past := tokens_past_vocabulary(path, tokenizer):
        raise DataError(
            f"{path}: the tokenizer has tokens that the model's vocabulary does not: {past}; give the model rows for "
            "them (resize_token_embeddings) and save it, or put the tokenizer of its training beside its weights"
        )


@dataclass(frozen=True)
class Template:
    """What stands around a question. `suffix` follows the question as it is written; `system` is the system message of
    a chat whose row has none of its own."""

    name: Literal["r1-zero", "chat", "none"] = "r1-zero"
    system: str | None = None
    suffix: str | None = None

    @classmethod
    def of(cls, data: Any) -> Template:
        """That of a config's section `data`."""
        return cls(data.template, data.system, data.suffix)

    def messages(self, question: Any, where: str) -> list[dict]:
        """The question as the messages of a chat. Raises `DataError`."""
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
        messages = messages_of(asked, where)
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.suffix and messages[-1]["role"] == "user":
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + self.suffix}]
        return messages

    def text(self, question: Any, tokenizer: Any, where: str) -> str:
        """What the model reads before it writes, what comes of the row `quoted`, so that no special token comes of it.
        Template none takes the question as it is, special tokens too. Raises `DataError`."""
        if not isinstance(question, str | list) or not question:
            raise DataError(f"{where}: the prompt must be a text, found {question!r:.80}")
        if self.name == "chat":
            if not tokenizer.chat_template:
                raise DataError(
                    "data.template: chat, but the policy's tokenizer has no chat template; use r1-zero or none"
                )
            return render(tokenizer, self.messages(question, where), None, True, where)
        if not isinstance(question, str):
            raise DataError(f"{where}: the prompt is a list of messages, which needs data.template=chat")
        if self.system is not None:
            raise DataError(f"{where}: a system message ({self.system!r:.40}) needs data.template=chat")
        question = valid(question + (self.suffix or ""), where)
        return R1_ZERO_TEMPLATE.format(prompt=quoted(question, tokenizer)) if self.name == "r1-zero" else question


def prompt_text(question: Any, template: str, tokenizer: Any, where: str) -> str:
    """`Template.text` of a template that has nothing but its name."""
    return Template(template).text(question, tokenizer, where)


def prompt_id(question: Any, values: dict[str, Any]) -> str:
    """A name for a question that depends on its content alone: neither on its place in the file nor on the run."""
    content = json.dumps([question, values], sort_keys=True, ensure_ascii=False, default=plain)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def column(values: dict[str, Any], name: str) -> Any:
    """A row's column; `a.b` is the entry `b` of the column `a`. Raises KeyError where there is none."""
    if name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    if not dot or not isinstance(values.get(first), dict):
        raise KeyError(name)
    return column(values[first], rest)


def level_of(value: Any) -> float:
    """A level as a number: itself, or the first number in a text ("Level 3"); 0 for anything else."""
    if isinstance(value, str):
        found = re.search(r"-?\d+(\.\d+)?", value)
        value = float(found[0]) if found else 0
    return value if isinstance(value, int | float) and value == value else 0


class Prompts(Sequence[Prompt]):
    """The prompts of one split, in the order of the data; exact duplicates are left out (and logged).

    Checks every row at once: the columns that are named and those that `rewards` ask for are there, the template takes
    the question, no prompt is longer than `max_prompt_tokens`, and some completion can be paid (the rewards' own
    `check_row`). Rows that fail are an error that lists them, or with `bad_rows: drop` left out (and logged).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        prompt_column: str = "prompt",
        answer_column: str | None = None,
        template: Literal["r1-zero", "chat", "none"] = "r1-zero",
        system: str | None = None,
        suffix: str | None = None,
        max_prompt_tokens: int,
        rewards: Sequence[Reward] = (),
        bad_rows: Literal["error", "drop"] = "error",
        progress: Progress = lambda done, total: None,
    ):
        self._tokenizer, self._template = tokenizer, Template(template, system, suffix)
        self._prompt_column, self._rewards = prompt_column, rewards
        rows = _with_answers(rows, prompt_column, answer_column)
        _check_rewards(rows, rewards)
        unique: dict[str, Row] = {}
        for row in rows:
            unique.setdefault(prompt_id(column(row.values, prompt_column), row.values), row)
        if len(unique) < len(rows):
            logger.warning("left out %d exact duplicates among %d rows", len(rows) - len(unique), len(rows))
        self._ids, self._rows = list(unique), list(unique.values())
        self._results = prepared(lambda: self._rows, self._prepare, self._key(), progress)
        self._kept = self._check(max_prompt_tokens, bad_rows)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        at = self._kept[index]
        tokens = tuple(self._results.value("tokens", at).tolist())
        return Prompt(self._ids[at], self._results.value("text", at), tokens, self._rows[at].values)

    def level(self, index: int) -> float:
        """The column `level` of a row as a number, 0 without one: the stream asks lower levels first."""
        return level_of(self._rows[self._kept[index]].values.get("level"))

    @property
    def fingerprint(self) -> str:
        """A hash of all questions in their order; equal exactly where the data and the template are."""
        template = self._template
        around = [part for part in (template.system, template.suffix) if part]
        digest = hashlib.sha256("\0".join([template.name, *around]).encode(errors="surrogatepass"))
        for at in self._kept:
            digest.update(self._ids[at].encode())
        return digest.hexdigest()[:16]

    def _key(self) -> str | None:
        tokenizer = tokenizer_identity(self._tokenizer)
        rewards = [[reward.address, reward.params] for reward in self._rewards]
        own = [reward.address for reward in self._rewards if not reward.address.startswith("rewards.")]
        if tokenizer is None or own:  # what a reward of somebody's own depends on is not known
            return None
        return key_of("prompts", self._ids, vars(self._template), self._prompt_column, rewards, tokenizer)

    def _prepare(self, rows: Sequence[Row]) -> list[Result]:
        """Of every row the prompt's text and tokens, why it cannot be asked, and why it cannot be paid."""
        found = []
        for row in rows:
            text, tokens, refused = "", [], ""
            try:
                text = self._template.text(column(row.values, self._prompt_column), self._tokenizer, row.where)
                tokens = self._encode(text)
            except DataError as error:
                refused = str(error)
            unpaid = next((why for reward in self._rewards if (why := _unpaid(reward, row.values))), "")
            text, tokens = unquoted(text), np.array(tokens, np.int32)
            found.append({"text": text, "tokens": tokens, "refused": refused, "unpaid": unpaid})
        return found

    def _check(self, max_prompt_tokens: int, bad_rows: str) -> list[int]:
        """The rows that can be asked and paid. Raises `DataError` that lists the others unless they are dropped."""
        results, count = self._results, len(self._rows)
        lengths = results.lengths("tokens") if count else []
        faults: dict[str, dict[int, str]] = {
            "{} of {} prompts cannot be asked": {
                i: results.value("refused", i) for i in np.flatnonzero(results.lengths("refused"))
            },
            "{} of {} prompts are longer than the " + f"{max_prompt_tokens} tokens that the context leaves for a "
            "prompt; raise data.max_prompt_tokens or take them out": {
                i: f"{self._rows[i].where}: {lengths[i]} tokens" for i in np.flatnonzero(lengths > max_prompt_tokens)
            },
            "{} of {} rows can never be paid: no completion is right by the rewards of this run; mend the rows, take "
            "them out, or name another data.answer_column": {
                i: f"{self._rows[i].where}: {results.value('unpaid', i)}"
                for i in np.flatnonzero(results.lengths("unpaid"))
            },
        }
        messages = [
            listed(title.format(len(lines), count), list(lines.values())) for title, lines in faults.items() if lines
        ]
        if messages and bad_rows == "error":
            raise DataError("\n".join([*messages, "(data.bad_rows=drop leaves such rows out)"]))
        for message in messages:
            logger.warning("left out: %s", message)
        bad = {i for lines in faults.values() for i in lines}
        if len(bad) == count:
            raise DataError("\n".join([*messages, "no row is left"]))
        return [i for i in range(count) if i not in bad]

    def _encode(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself; else the tokenizer adds its own (BOS), as in pre-training.
        tokens = encode_quoted(self._tokenizer, text, special=self._template.name != "chat")
        return tokens[:-1] if tokens and tokens[-1] == self._tokenizer.eos_token_id else tokens


def load_prompts(
    config: Config, tokenizer: Any, split: Split, progress: Progress = lambda done, total: None
) -> Prompts:
    """The prompts of `data.train` or `data.evaluation`. The held-out set is cut to `evaluation.prompts`, drawn once
    and for all: equal for every seed of a run, so that runs can be compared."""
    data = config.data
    source = data.train if split == "train" else data.evaluation
    if source is None:
        raise DataError("data.evaluation: not set; name the held-out questions to evaluate on")
    params = data.params if split == "train" else {**data.params, **data.evaluation_params}
    rows = load_rows(source, params, split, seed=config.seed if split == "train" else 0)
    if split == "evaluation" and config.evaluation.prompts is not None and config.evaluation.prompts < len(rows):
        rows = random.Random("held out").sample(rows, config.evaluation.prompts)
    return Prompts(
        rows,
        tokenizer,
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        template=data.template,
        system=data.system,
        suffix=data.suffix,
        max_prompt_tokens=data.max_prompt_tokens,
        rewards=[load_reward(reward.fn, reward.params) for reward in config.rewards],
        bad_rows=data.bad_rows,
        progress=progress,
    )


class PromptStream:
    """An endless stream over `prompts`, each epoch in an order of its own that depends on (seed, epoch) alone. Rows
    with a column `level` come in ascending levels in the first epoch, shuffled within one.

    `position` counts the prompts handed out since the start. The state holds it and the positions of those that were
    taken and not `used` yet: a resumed run is handed these first. From the second epoch on a prompt's id carries the
    epoch (`<id>@1`), so that two passes over it never meet as one request.
    """

    def __init__(self, prompts: Prompts, seed: int):
        self._prompts, self._seed = prompts, seed
        self._order: tuple[int, list[int]] | None = None  # (epoch, permutation)
        self._taken: dict[str, int] = {}  # id -> position of those not used yet, in the order they were taken
        self._again: deque[int] = deque()  # positions to hand out again
        self.position = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, distinct in their ids."""
        again = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        fresh = range(self.position, self.position + count - len(again))
        self.position = fresh.stop
        taken = {position: self._at(position) for position in (*again, *fresh)}
        self._taken.update((prompt.id, position) for position, prompt in taken.items())
        return list(taken.values())

    def used(self, prompts: Iterable[Prompt]) -> None:
        """Prompts that were taken have done their part: a run resumed from here on does not ask them again."""
        for prompt in prompts:
            del self._taken[prompt.id]

    def state_dict(self) -> dict[str, Any]:
        unused = [*self._taken.values(), *self._again]
        return {"position": self.position, "unused": unused, "seed": self._seed, "data": self._prompts.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Raises `DataError` where it belongs to other data or another seed: the stream would
        then repeat some questions and never ask others."""
        here = self.state_dict()
        if changed := [key for key in ("seed", "data") if state[key] != here[key]]:
            raise DataError(
                f"the checkpoint was made with another {' and '.join(changed)} "
                f"(saved {[state[k] for k in changed]}, now {[here[k] for k in changed]}); "
                "resume with the config and files of the run, or start a new run under another name"
            )
        self.position, self._taken = int(state["position"]), {}
        self._again = deque(state.get("unused", ()))  # checkpoints of earlier releases left none unused

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self._prompts)))
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
            if epoch == 0:  # a curriculum: easier levels first, shuffled within a level; later everything is mixed
                order.sort(key=self._prompts.level)
            self._order = (epoch, order)
        prompt = self._prompts[self._order[1][index]]
        if epoch == 0:
            return prompt
        return Prompt(id=f"{prompt.id}@{epoch}", text=prompt.text, tokens=prompt.tokens, row=prompt.row)


def _with_answers(rows: Sequence[Row], prompt_column: str, answer_column: str | None) -> list[Row]:
    """The rows with the column `answer` that rewards get. Raises `DataError` where a column that is named is not there
    in every row."""
    for name in (prompt_column, answer_column):
        missing = [row for row in rows if name is not None and not _has(row.values, name)]
        if missing:
            raise DataError(
                f"{missing[0].where}: no column '{name}' (in {len(missing)} of {len(rows)} rows); found "
                f"{_columns(missing[0])}; set data.prompt_column or data.answer_column"
            )
    if answer_column is None:
        return list(rows)
    return [Row({**row.values, "answer": column(row.values, answer_column)}, row.where) for row in rows]


def _check_rewards(rows: Sequence[Row], rewards: Sequence[Reward]) -> None:
    """Raises `DataError` where a reward asks for a column that not every row has."""
    for reward in rewards:
        for name in (name for name in reward.required if name not in reward.params):
            if missing := [row for row in rows if name not in row.values]:
                cure = "set data.answer_column to the one that holds it" if name == "answer" else "rename a column"
                raise DataError(
                    f"{missing[0].where}: no column '{name}', which {reward.address} needs (in {len(missing)} of "
                    f"{len(rows)} rows); found {_columns(missing[0])}; {cure}, or give the value under 'params' of "
                    "this reward"
                )


def _unpaid(reward: Reward, values: dict[str, Any]) -> str | None:
    try:
        return reward.check_row(values)
    except Exception as error:  # the check of a reward may be anybody's code
        return f"the check of {reward.address} failed: {type(error).__name__}: {error}"


def _has(values: dict[str, Any], name: str) -> bool:
    try:
        column(values, name)
    except KeyError:
        return False
    return True


def _columns(row: Row) -> str:
    return ", ".join(map(str, row.values)) or "an empty object"
