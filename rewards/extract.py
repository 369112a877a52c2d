"""Where the final answer of a completion is, read strictly: what a reader would not take as *the* answer is not one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# Written by a model that does not stop: nothing after one of these belongs to the completion.
# Two patterns, each with a literal first character, because that is what `re` finds fast in a megabyte.
_END = re.compile(
    r"<(?:\|(?:im_end|im_start|endoftext|eot_id|end_of_text|start_header_id|end|user|system)\|>|/s>|eos>|(?:end"
    r"|start)_of_turn>"
    r"|｜(?:end▁of▁sentence|begin▁of▁sentence|User)｜>)"
)
_INST = re.compile(r"\[/?INST\]")
MAX_FINAL_CHARACTERS = 200_000
# A turn that the model plays for somebody else. Looked for in the answer part only: reasoning may quote a dialogue.
_TURN = re.compile(
    r"\n(?:[ \t#*>]*(?:user|human|assistant|system|question|problem|instruction|q)[ \t*]*:"
    r"|#{1,6}[ \t]*(?:user|human|assistant|system|instruction|problem|question)(?:[ \t]*\d+)?[ \t*]*(?::|$))",
    re.I | re.M,
)

# Spellings that a lenient reader would take for the tag, so that what is in them is not clearly the answer.
_LOOSE_THINK = re.compile(r"<\s*[/\\]?\s*think(?:ing)?\b[^<>]{0,64}>", re.I)
_LOOSE_ANSWER = re.compile(r"<\s*[/\\]?\s*answer\b[^<>]{0,64}>", re.I)

AnswerTag = Literal["auto", "required", "never"]


@dataclass(frozen=True)
class Final:
    """The part of a completion that states the answer; `text` is None when there is none, and `why` says why."""

    text: str | None
    why: str


def cut_at_end(completion: str) -> str:
    """The completion up to the first end-of-sequence or turn token."""
    for pattern in (_END, _INST):
        found = pattern.search(completion)
        if found:
            completion = completion[: found.start()]
    return completion


def final_part(completion: str, answer_tag: AnswerTag = "auto", require_think: bool = False) -> Final:
    """What follows `</think>`, inside `<answer>` when the template has it (R1-Zero, arXiv 2501.12948).

    The text is cut at an end-of-sequence token and where the model begins another speaker's turn. A completion without
    any think tag is taken whole unless `require_think`; one whose reasoning is still open has no final part. The answer
    tag must then occur exactly once, opened before it is closed; `auto` takes the whole part when the tag is absent.
    """
    text = cut_at_end(completion)
    first_close = text.find("</think>")
    answer_from = first_close + len("</think>") if first_close >= 0 else 0
    if len(text) - max(answer_from, text.rfind("</think>")) > MAX_FINAL_CHARACTERS:
        return Final(None, f"an answer part of more than {MAX_FINAL_CHARACTERS} characters")
    turn = _TURN.search(text, answer_from)
    while turn and not text[answer_from : turn.start()].strip():  # a label in front of the answer itself
        turn = _TURN.search(text, turn.end())
    if turn:
        text = text[: turn.start()]
    last_close = text.rfind("</think>")
    if last_close > first_close:
        return Final(None, "several </think>: where the reasoning ends is not clear")
    if last_close < 0 and (require_think or "<think>" in text):
        return Final(None, "the reasoning is not closed: no </think>")
    part = text[last_close + len("</think>") :] if last_close >= 0 else text
    if "<" in part and _LOOSE_THINK.search(part):
        return Final(None, "a think tag after the last </think>")
    if "<" in part and len(_LOOSE_ANSWER.findall(part)) != part.count("<answer>") + part.count("</answer>"):
        return Final(None, "an answer tag in another spelling")
    opens, closes = part.count("<answer>"), part.count("</answer>")
    if answer_tag == "never" or (answer_tag == "auto" and opens == closes == 0):
        return Final(part, "after </think>" if last_close >= 0 else "the whole completion")
    start, stop = part.find("<answer>"), part.find("</answer>")
    if opens != 1 or closes != 1 or stop < start:
        return Final(None, f"expected one <answer>...</answer>, found {opens} opening and {closes} closing tags")
    return Final(part[start + len("<answer>") : stop], "inside <answer>")


def reasoning_part(completion: str) -> str:
    """What stands in front of the last `</think>`, without the opening tag; the whole text without such a tag."""
    text = cut_at_end(completion)
    head, close, _ = text.rpartition("</think>")
    reasoning = head if close else text
    return reasoning.strip().removeprefix("<think>")
