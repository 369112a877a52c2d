"""Text as token ids with a mask of what is learned: conversations by their chat template, and prompts with completions.

What is learned is what the policy would have to write: an assistant's turns with the token that ends each. A prompt's
tokens are those that it would be given when it writes, so a border between prompt and completion is never inside a
token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from rlzero.data.sources import DataError
from rollout.tokenizer import encode_quoted, quoted, unquoted
from trainer.packing import Sample

GENERATION = re.compile(r"\{%-?\s*generation\b")  # a template that marks the assistant's turns itself
WORD = re.compile(r"\w+|[^\w\s]")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # where messages hold an answer's thoughts apart
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    "system": "system",
}  # the `from` of ShareGPT's rows -> a role


@dataclass(frozen=True)
class Example:
    """One row: its tokens, which of them are learned, and where it stands (`file:line`)."""

    tokens: Int32[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]
    where: str

    @property
    def sample(self) -> Sample:
        return Sample((), self.tokens, learned=self.learned)


Segment = tuple[str, bool]  # text, and whether it is learned


@dataclass
class TextRow:
    """A row as text, before it becomes tokens: its segments in order. `special`: the tokenizer adds BOS and the like
    (a chat template writes them itself)."""

    segments: list[Segment]
    special: bool
    where: str


# --- messages --------------------------------------------------------------------------------------------------------


def messages_of(value: Any, where: str) -> list[dict]:
    """Messages with `role` and `content`, of those, of ShareGPT's `from` and `value`, or of their JSON text. Keys
    without a value are left out (tables give every message the keys of all); parts that are all text become one.
    Raises `DataError`."""
    value = _parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f"{where}: expected a list of messages, each with `role` and `content`, found "
            f"{json.dumps(value, default=str)[:120]}"
        )
    messages = []
    for message in map(without_missing, value):
        if "role" not in message and "from" in message:
            speaker = str(message.pop("from"))
            if speaker.lower() not in SPEAKERS:
                raise DataError(f"{where}: a message is from {speaker!r}; expected one of {', '.join(SPEAKERS)}")
            message = {"role": SPEAKERS[speaker.lower()], "content": message.pop("value", ""), **message}
        if not isinstance(message.get("role"), str):
            raise DataError(f"{where}: a message has no `role`, found {json.dumps(message, default=str)[:120]}")
        content = message.setdefault("content", "")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            message["content"] = "".join(str(part.get("text", "")) for part in content)
        for text in (message["content"], *(message.get(name) for name in THOUGHTS)):
            valid(text if isinstance(text, str) else "", where)
        messages.append(message)
    return messages


def tools_of(value: Any) -> list | None:
    """The tools of a conversation: a list, its JSON text, or a list of JSON texts; None without any."""
    value = _parsed(value)
    return [without_missing(_parsed(tool)) for tool in value] if isinstance(value, list) and value else None


def without_missing(value: Any) -> Any:
    """`value` without what is None in dictionaries, at any depth, and without empty lists of tool calls."""
    if isinstance(value, dict):
        return {
            key: without_missing(item)
            for key, item in value.items()
            if item is not None and not (key == "tool_calls" and not item)
        }
    return [without_missing(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def valid(text: str, where: str) -> str:
    """`text`, if it can be encoded. Raises `DataError` for a lone surrogate, half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a character (the lone surrogate {text[error.start]!a}) in "
            f"{text[max(0, error.start - 20) : error.start + 20]!a}; the text was cut or decoded wrongly; mend the row"
        ) from error
    return text


def quoted_messages(messages: list[dict], tokenizer: Any) -> list[dict]:
    """`messages` with their texts `quoted`, those of the assistant excepted, who writes special tokens."""
    return [
        {**m, "content": quoted(m["content"], tokenizer)}
        if m.get("role") != "assistant" and isinstance(m.get("content"), str)
        else m
        for m in messages
    ]


def learned_share(messages: Sequence[dict], text: str) -> float:
    """How much of the words of all the assistant's messages, thoughts included, stands in the text that is learned."""
    said = [
        part
        for message in messages
        if message["role"] == "assistant"
        for name in ("content", *THOUGHTS)
        if isinstance(part := message.get(name), str)
    ]
    if all(part.strip() in text for part in said):
        return 1.0
    words, learned = Counter(WORD.findall(" ".join(said))), Counter(WORD.findall(text))
    return (words & learned).total() / words.total()


# --- by the chat template --------------------------------------------------------------------------------------------


def chat_segments(tokenizer: Any, messages: list[dict], tools: list | None, where: str) -> list[Segment]:
    """The conversation as the tokenizer's template writes it, up to the end of the last answer, cut where the assistant
    begins to write and where its turn ends. Both cuts are found by rendering the messages up to there, so the template
    must write them the same inside the whole conversation (be prefix-stable). Raises `DataError` where it does not."""
    whole = render(tokenizer, messages, tools, False, where)
    segments: list[Segment] = []
    at = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError(f"{where}: the conversation begins with the assistant; expected a system or user message")
        for text, learned in (
            (render(tokenizer, messages[:index], tools, True, where), False),
            (render(tokenizer, messages[: index + 1], tools, False, where), True),
        ):
            if not whole.startswith(text) or len(text) < at:
                same = next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), len(whole))
                raise DataError(
                    f"{where}: the chat template is not prefix-stable: up to message {index + 1} alone it writes "
                    f"{text[max(0, same - 20) : same + 20]!r}, inside the whole conversation "
                    f"{whole[max(0, same - 20) : same + 20]!r}; so the assistant's tokens cannot be told from the "
                    "rest. Mark them with {% generation %} in data.chat_template, or make every answer a row of its own"
                )
            segments.append((text[at:], learned))
            at = len(text)
    return segments or [(whole, False)]


def render(tokenizer: Any, messages: list[dict], tools: list | None, generation: bool, where: str) -> str:
    """What the chat template writes; `generation` opens the assistant's turn. Raises `DataError` where it refuses."""
    try:
        messages = quoted_messages(messages, tokenizer)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template is a program that came with the model: whatever it raises is its answer
        raise _refused(where, error) from error
    return valid(text, where)


def _refused(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: the chat template refuses this conversation: {error}; write the row as the template takes it (a "
        "system text can stand at the start of the user's), or use another template"
    )


def marked_by_template(tokenizer: Any, messages: list[dict], tools: list | None, where: str) -> Example:
    """By the template's own {% generation %} blocks."""
    try:
        out = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:
        raise _refused(where, error) from error
    return trimmed(out["input_ids"], np.array(out["assistant_masks"], bool), where)


def tokenize(texts: Sequence[TextRow], tokenizer: Any) -> Iterator[Example | DataError]:
    """Text as tokens, with every segment's border between two of them; the error of a text that has none. The tokens of
    everything before a border are those that the tokenizer gives it alone: what a prompt would be when the policy
    writes on."""
    for special in (True, False):
        if any(text.special is special for text in texts) and all(text.special is special for text in texts):
            parts = [[s for s, _ in text.segments] for text in texts]
            heads = ["".join(p[: i + 1]) for p in parts for i in range(len(p))]
            encoded = iter(encode(tokenizer, heads, special))
            # What ends that which is learned: EOS, in a chat also the template's own markers.
            enders = {tokenizer.eos_token_id} if special else special_tokens(tokenizer)
            for text in texts:
                try:
                    yield _joined(text, [next(encoded) for _ in text.segments], tokenizer, enders)
                except DataError as error:
                    yield error
            return
    for text in texts:  # kinds of rows side by side
        yield from tokenize([text], tokenizer)


def _joined(text: TextRow, heads: list[list[int]], tokenizer: Any, enders: set[int]) -> Example:
    """`heads` are the tokens up to the end of every segment. What is learned ends with a token that ends: EOS is added
    where the last segment to learn has none."""
    whole = heads[-1]
    if all(whole[: len(head)] == head for head in heads):
        ends = [len(head) for head in heads]
    else:  # a token would span a border: every segment by itself, as the policy would meet and write it
        pieces = [heads[0], *encode(tokenizer, [s for s, _ in text.segments[1:]], False)]
        joined = [token for piece in pieces for token in piece]
        if tokenizer.decode(joined) != tokenizer.decode(whole):
            raise DataError(
                f"{text.where}: no border between tokens where the answer begins: the tokenizer joins the end of the "
                f"prompt {text.segments[0][0][-20:]!r} with the start of the completion "
                f"{text.segments[1][0][:20]!r}; move the space or line break to the other side"
            )
        whole, ends = joined, list(np.cumsum([len(piece) for piece in pieces]))
    tokens, mask, start = list(whole), np.zeros(len(whole) + 1, bool), 0
    last = max((i for i, (_, learned) in enumerate(text.segments) if learned), default=-1)
    for i, ((_, learned), end) in enumerate(zip(text.segments, ends, strict=True)):
        if learned:
            ender = next((t for t in range(end - 1, start - 1, -1) if tokens[t] in enders), None)
            ended = ender is not None and not tokenizer.decode(tokens[ender + 1 : end]).strip()
            mask[start : ender + 1 if ended else end] = True  # the line break after the end of a turn is not written
            if i == last and not ended and end > start:
                tokens = [*tokens[:end], tokenizer.eos_token_id]
                mask[end] = True
                break
        start = end
    return trimmed(tokens, mask[: len(tokens)], text.where)


def trimmed(tokens: Sequence[int], learned: Bool[np.ndarray, " n"], where: str) -> Example:
    """Without what follows the last token to learn."""
    end = int(learned.nonzero()[0][-1]) + 1 if learned.any() else len(tokens)
    return Example(np.array(tokens[:end], np.int32), learned[:end], where)


def encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of every text; with `special` what the tokenizer adds at the start, but no EOS at the end."""
    plain = all(unquoted(text) == text for text in texts)
    encoded = (
        tokenizer(texts, add_special_tokens=special)["input_ids"]
        if plain
        else [encode_quoted(tokenizer, text, special) for text in texts]
    )
    eos = tokenizer.eos_token_id
    return [ids[:-1] if special and ids and ids[-1] == eos else ids for ids in encoded]


def special_tokens(tokenizer: Any) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}
