"""Data sets and procedural tasks -> a resumable stream of prompts.

A source named in the config gives rows; a template turns a row into a prompt's text; the tokenizer turns the text into
tokens; `PromptStream` hands the prompts out, shuffled anew in every epoch, from a position that survives restarts.
Whatever is wrong with a file is said with its name and line before anything starts (`DataError`, exit code 2).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rollout.engine import Prompt
from rollout.tokenizer import encode_quoted, quoted, read_tokenizer, tokens_past_vocabulary, unquoted

logger = logging.getLogger(__name__)

Split = Literal["train", "evaluation"]

# The conversation of R1-Zero (arXiv 2501.12948, table 1), retold. It ends where the assistant's turn begins, so that
# the model itself opens <think>.
R1_ZERO_TEMPLATE = (
    "User asks a question and Assistant solves it. Assistant first works through the problem, then gives the answer. "
    "The work stands inside <think> </think> and the answer inside <answer> </answer>, like this: "
    "<think> the work </think> <answer> the answer </answer>.\n"
    "User: {prompt}\n"
    "Assistant:"
)

SHOWN = 5  # bad lines listed in one error


class DataError(UsageError):
    """A data set, tokenizer or generator that cannot be used; the message says where and what to do."""


@dataclass(frozen=True)
class Row:
    """The columns of one record and where it stands: `file:line`, or the generator and the index."""

    values: dict[str, Any]
    where: str


# --- rows ------------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[Row]:
    """One row per line of a JSON-lines file; blank lines are skipped. Raises `DataError` that lists bad lines."""
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file (looked in {Path.cwd()})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if lines[0].lstrip().startswith(b"["):
        raise DataError(f"{path}:1: this is a JSON array; expected JSON lines, one object on each line")
    rows: list[Row] = []
    bad: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad.append(f"{where}: not UTF-8 at byte {error.start}")
            continue
        except json.JSONDecodeError as error:
            bad.append(f"{where}: malformed JSON at column {error.colno}: {error.msg}")
            continue
        if not isinstance(values, dict):
            bad.append(f"{where}: expected a JSON object, found {type(values).__name__}")
            continue
        rows.append(Row(values, where))
    if bad:
        raise DataError(_listed(f"{path}: {len(bad)} bad line{'s' * (len(bad) > 1)}", bad))
    return rows


def load_rows(source: str, params: dict[str, Any], split: Split, seed: int) -> list[Row]:
    """The rows of a source: `countdown`, a path to JSON lines, or `module:function` / `file.py:function`.

    A function is called with `params`, and with `seed` and `split` ("train" or "evaluation") where it takes them; it
    returns dictionaries. Raises `DataError` where the source does not exist, fails or is empty.
    """
    function: Callable[..., Iterable[dict]] | None = None
    if source == "countdown":
        from rlzero.examples.countdown import task as countdown

        given = {"split": "train" if split == "train" else "held_out", "seed": seed, "count": 4096}
        accepted = [*inspect.signature(countdown.rows).parameters, *inspect.signature(countdown.tasks).parameters]
        if unknown := sorted(set(params) - set(accepted)):
            raise DataError(f"data: countdown takes no parameter {', '.join(unknown)}; it takes {', '.join(accepted)}")
        function, params = countdown.rows, {**given, **params}
    elif re.search(r":[A-Za-z_]\w*$", source):
        function = load_function(source)
        accepted_by_name = inspect.signature(function).parameters
        given = {k: v for k, v in {"seed": seed, "split": split}.items() if k in accepted_by_name}
        params = {**given, **params}
        try:
            inspect.signature(function).bind(**params)
        except TypeError as error:
            raise DataError(f"data: {source} cannot be called with {sorted(params)}: {error}") from error
    if function is None:
        rows = read_jsonl(source)
        if params:
            raise DataError(f"data: params {sorted(params)} are given, but {source} is a file and takes none")
    else:
        try:
            made = list(function(**params))
        except Exception as error:  # the generator is user code: whatever it raises is reported as its failure
            raise DataError(f"data: {source} failed: {type(error).__name__}: {error}") from error
        rows = [Row(values, f"{source}[{index}]") for index, values in enumerate(made)]
        if wrong := [row.where for row in rows if not isinstance(row.values, dict)]:
            raise DataError(f"data: {wrong[0]} is not a dictionary; a generator returns one dictionary per question")
    if not rows:
        raise DataError(f"{source}: the data set is empty")
    return rows


def load_function(address: str) -> Callable:
    """The function that `package.module:name` or `path/file.py:name` points to. Raises `DataError`."""
    target, _, name = address.rpartition(":")
    try:
        if target.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(target).stem, target)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(target)
    except Exception as error:  # importing runs user code
        raise DataError(f"data: {address} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"data: {address}: {target} has no function {name}")
    return function


# --- prompts ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer in folder `path`. Raises `DataError` where there is none or it has no EOS."""
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


def prompt_text(question: str | list[dict], template: str, tokenizer: Any, where: str) -> str:
    """What the model reads before it writes: the question inside the template, `quoted`, so that no special token comes
    of it. Template none takes the question as it is, special tokens too."""
    if template == "chat":
        if not tokenizer.chat_template:
            raise DataError("data.template: chat, but the policy's tokenizer has no chat template; use r1-zero or none")
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        messages = quoted_messages(messages, tokenizer)
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not isinstance(question, str):
        raise DataError(f"{where}: the prompt is a list of messages, which needs data.template=chat")
    return R1_ZERO_TEMPLATE.format(prompt=quoted(question, tokenizer)) if template == "r1-zero" else question


def quoted_messages(messages: list[dict], tokenizer: Any) -> list[dict]:
    """`messages` with their texts `quoted`, those of the assistant excepted, who writes special tokens."""
    return [
        {**m, "content": quoted(m["content"], tokenizer)}
        if m.get("role") != "assistant" and isinstance(m.get("content"), str)
        else m
        for m in messages
    ]


def prompt_id(question: Any, values: dict[str, Any]) -> str:
    """A name for a question that depends on its content alone: neither on its place in the file nor on the run."""
    content = json.dumps([question, values], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class Prompts(Sequence[Prompt]):
    """The prompts of one split, in the order of the data; exact duplicates are left out (and logged).

    Checks every row at once: the columns are there, and no prompt is longer than `max_prompt_tokens`. Tokens are made
    anew on every access, so that a large data set does not stay in memory twice.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        prompt_column: str = "prompt",
        answer_column: str | None = None,
        template: Literal["r1-zero", "chat", "none"] = "r1-zero",
        max_prompt_tokens: int,
    ):
        self._tokenizer, self._template = tokenizer, template
        _check_columns(rows, [c for c in (prompt_column, answer_column) if c is not None])
        unique: dict[str, tuple[str, dict]] = {}
        too_long: list[str] = []
        for row in rows:
            question = row.values[prompt_column]
            if not isinstance(question, str | list) or not question:
                raise DataError(f"{row.where}: column '{prompt_column}' must hold a text, found {question!r}")
            values = dict(row.values) if answer_column is None else {**row.values, "answer": row.values[answer_column]}
            text = prompt_text(question, template, tokenizer, row.where)
            length = len(self._encode(text))
            if length > max_prompt_tokens:
                too_long.append(f"{row.where}: {length} tokens")
            unique.setdefault(prompt_id(question, values), (text, values))
        if too_long:
            raise DataError(
                _listed(
                    f"{len(too_long)} of {len(rows)} prompts are longer than the {max_prompt_tokens} tokens that the "
                    "context leaves for a prompt; raise data.max_prompt_tokens or take them out",
                    too_long,
                )
            )
        if len(unique) < len(rows):
            logger.warning("left out %d exact duplicates among %d rows", len(rows) - len(unique), len(rows))
        self._items = list(unique.items())

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        identity, (text, values) = self._items[index]
        return Prompt(id=identity, text=unquoted(text), tokens=tuple(self._encode(text)), row=values)

    def level(self, index: int) -> float:
        """The column `level` of a row, 0 without one: the stream asks lower levels first."""
        return self._items[index][1][1].get("level", 0)

    @property
    def fingerprint(self) -> str:
        """A hash of all questions in their order; equal exactly where the data and the template are."""
        digest = hashlib.sha256(self._template.encode())
        for identity, _ in self._items:
            digest.update(identity.encode())
        return digest.hexdigest()[:16]

    def _encode(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself; else the tokenizer adds its own (BOS), as in pre-training.
        tokens = encode_quoted(self._tokenizer, text, special=self._template != "chat")
        return tokens[:-1] if tokens and tokens[-1] == self._tokenizer.eos_token_id else tokens


def load_prompts(config: Config, tokenizer: Any, split: Split) -> Prompts:
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
        max_prompt_tokens=data.max_prompt_tokens,
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


def _check_columns(rows: Sequence[Row], columns: Sequence[str]) -> None:
    for column in columns:
        missing = [row for row in rows if column not in row.values]
        if missing:
            first = missing[0]
            raise DataError(
                f"{first.where}: no column '{column}' (in {len(missing)} of {len(rows)} rows); found "
                f"{', '.join(map(str, first.values)) or 'an empty object'}; "
                "set data.prompt_column or data.answer_column"
            )


def _listed(title: str, lines: list[str]) -> str:
    more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([title, *(f"  {line}" for line in lines[:SHOWN]), *more])
