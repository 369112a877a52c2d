r"""The final value of a completion: the last balanced `\boxed{}` of its final part, and only if nothing speaks against
it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rewards.extract import AnswerTag, final_part
from rewards.math.context import HIDDEN, same_value, spoken_against
from rewards.math.normal import SAME_CHARACTERS, Unreadable, closing, normalise
from rewards.math.phrase import stated_value

MAX_BOXES = 64
MAX_BOX_CHARACTERS = 3_000
_UNCLOSED = "a \\boxed{} that is not closed, or longer than an answer"

Boxed = Literal["auto", "required"]
_BOX = re.compile(r"(?<!\\)\\f?boxed\b\s*")


@dataclass(frozen=True)
class Found:
    """The text of the value, or None with the reason."""

    text: str | None
    why: str


def find_answer(
    completion: str,
    boxed: Boxed = "auto",
    answer_tag: AnswerTag = "auto",
    require_think: bool = False,
    strict: bool = False,
) -> Found:
    r"""What the completion states as its one final value.

    In the final part (rewards.extract) code, comments and struck text are dropped; then the last `\boxed{}` counts.
    None when a box is not closed, boxes differ, the box is denied ("not \boxed{7}"), or the text behind it retracts it
    or states another value. Without a box the content of `<answer>` counts, unless `boxed` is `required`: as it stands
    or, unless `strict`, the one value of a short phrase (see rewards.math.phrase). A completion with neither states
    nothing.
    """
    final = final_part(completion, answer_tag, require_think)
    if final.text is None:
        return Found(None, final.why)
    part = final.text
    if "\\boxed" not in part and "\\fboxed" not in part:
        if boxed == "auto" and final.why == "inside <answer>" and answer_tag != "never":
            return _unboxed(part.strip(), strict)
        return Found(None, "no \\boxed{}")
    last_box = part.rfind("\\boxed{")
    if (
        last_box >= 0 and closing(part, last_box + len("\\boxed"), MAX_BOX_CHARACTERS) is None
    ):  # before anything that takes long
        return Found(None, _UNCLOSED)
    part = HIDDEN.sub(" ", part)
    boxes: list[tuple[int, int, str]] = []  # start, end, content
    position = 0
    while match := _BOX.search(part, position):
        if match.end() >= len(part) or part[match.end()] != "{":
            return Found(None, "a \\boxed without braces")
        end = closing(part, match.end(), MAX_BOX_CHARACTERS)
        if end is None:
            return Found(None, _UNCLOSED)
        boxes.append((match.start(), end + 1, part[match.end() + 1 : end]))
        position = end + 1
        if len(boxes) > MAX_BOXES:
            return Found(None, f"more than {MAX_BOXES} boxes")
    if not boxes:
        return Found(None, "no \\boxed{} outside code and comments")
    if any(content not in final.text for _, _, content in boxes):
        return Found(None, "code or a comment inside a box")
    texts = [_unwrap(content) for _, _, content in boxes]
    if any(_BOX.search(text) for text in texts):
        return Found(None, "a box inside a box")
    seen = part.translate(SAME_CHARACTERS)
    try:
        canonical = [normalise(text) for text in texts]
        if any(not same_value(canonical[-1], other) for other in canonical[:-1]):
            return Found(None, f"{len(boxes)} boxes with different values")
        last = canonical[-1]
        if not last:
            return Found(None, "the box is empty")
        for index, (start, end, _) in enumerate(boxes):
            why = spoken_against(seen, start, end, last, index == len(boxes) - 1)
            if why is not None:
                return Found(None, why)
    except Unreadable as refused:
        return Found(None, f"refused: {refused}")
    return Found(texts[-1].strip(), "the last \\boxed{}")


def _unboxed(content: str, strict: bool) -> Found:
    if not content:
        return Found(None, "<answer> is empty")
    value = None if strict else stated_value(content)
    if value is None:
        return Found(content, "the content of <answer>")
    return Found(value, "the content of <answer>" if value == content else "the one value of a phrase in <answer>")


def _unwrap(content: str) -> str:
    """A box that holds nothing but a box is that box."""
    for _ in range(3):
        match = _BOX.match(content.strip())
        if match is None:
            return content
        inner = content.strip()
        end = closing(inner, match.end()) if inner[match.end() : match.end() + 1] == "{" else None
        if end != len(inner) - 1:
            return content
        content = inner[match.end() + 1 : end]
    return content
