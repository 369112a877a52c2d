r"""The final value of a completion: the last balanced `\boxed{}` of its final part, and only if nothing speaks against it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rewards.extract import AnswerTag, final_part
from rewards.math.normal import Unreadable, key, normalise
from rewards.math.rational import rational

MAX_BOXES = 64
MAX_BOX_CHARACTERS = 3_000
_UNCLOSED = "a \\boxed{} that is not closed, or longer than an answer"

Boxed = Literal["auto", "required"]

_HIDDEN = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|<!--.*?(?:-->|\Z)|`[^`\n]*`|\\begin\{(comment|verbatim|lstlisting)\}.*?(?:\\end\{\1\}|\Z)"
    r"|^[ \t]*%[^\n]*|(?<=[^\d\s\\$%])[ \t]+%[^\n]*",
    re.S | re.M,
)
_BOX = re.compile(r"(?<!\\)\\f?boxed\b\s*")
_STRUCK = re.compile(r"(?:\\(?:x|b)?cancel|\\sout|\\st|\\[hv]?phantom|\\text(?:color)?\{white\}|\\color\{white\})\s*\{[^{}]*$|~~[^~\n]*$")
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|isnt)|n['’]t|\b(?:rather than|instead of|other than|except|unlike|excluding|different from|"
    r"wrong|incorrect|false|suppose|assume|if|whether)|\\neq?\b|≠|!=)[\s$:*\\(\[,=]*(?:(?:be|equal(?:s|ly)?|to|simply|just|the|answer|is|necessarily|actually|a|an)\b[\s$:*\\(\[,=]*){0,4}$",
    re.I,
)
_RETRACTED = re.compile(
    r"\b(?:wait|actually|oops|hmm+|scratch that|on second thought|i was wrong|my mistake|i made (?:a|an) (?:mistake|error)|correction|"
    r"disregard|retract|let me (?:re|double|correct|fix|try)|should (?:instead )?be|should have been|"
    r"(?:is|was|are|seems?|looks?|would be) (?:not (?:correct|right|the (?:right |correct |final )?answer)|wrong|incorrect|false|invalid|a mistake)|"
    r"isn['’]?t (?:correct|right|the (?:answer|right|correct))|(?:this|that|it)(?: is|['’]s) not|not the (?:final |right |correct )?answer|"
    r"but (?:that|this|it)\b|but (?:the|my) (?:correct|real|actual|true|final) |(?:real|actual|true|correct|final|right) (?:answer|value|result)(?: is|:)|"
    r"(?:or|alternatively|otherwise|maybe|perhaps|possibly)\b[^.\n]{0,20}\d|changed? my mind|ignore (?:this|that|the)|sorry)",
    re.I,
)
_RESTATED = re.compile(
    r"\b(?:answer|result|value|total|sum|it|that|this)(?:['’]s|\s*(?:\bis\b|\bequals?\b|:|=))[\s*:]*(?P<value>[^\n]{1,80})", re.I
)
_STATED_NUMBER = re.compile(r"(?:is |equals |just |exactly |about |therefore )*[$\\(\[*\s]*(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\\[dt]?frac\s*\{[^{}]*\}\{[^{}]*\})")


@dataclass(frozen=True)
class Found:
    """The text of the value, or None with the reason. `exact` says that it stood in a box."""

    text: str | None
    why: str


def find_answer(
    completion: str, boxed: Boxed = "auto", answer_tag: AnswerTag = "auto", require_think: bool = False
) -> Found:
    r"""What the completion states as its one final value.

    In the final part (rewards.extract) code, comments and struck text are dropped; then the last `\boxed{}` counts.
    None when a box is not closed, boxes differ, the box is denied ("not \boxed{7}"), or the text behind it retracts it
    or states another value. Without a box the content of `<answer>` counts, unless `boxed` is `required`; a completion
    with neither states nothing.
    """
    final = final_part(completion, answer_tag, require_think)
    if final.text is None:
        return Found(None, final.why)
    part = final.text
    if "\\boxed" not in part and "\\fboxed" not in part:
        if boxed == "auto" and final.why == "inside <answer>" and answer_tag != "never":
            return Found(part.strip(), "the content of <answer>") if part.strip() else Found(None, "<answer> is empty")
        return Found(None, "no \\boxed{}")
    last_box = part.rfind("\\boxed{")
    if last_box >= 0 and _closing(part, last_box + len("\\boxed")) is None:  # before anything that takes long
        return Found(None, _UNCLOSED)
    part = _HIDDEN.sub(" ", part)
    boxes: list[tuple[int, int, str]] = []  # start, end, content
    position = 0
    while match := _BOX.search(part, position):
        if match.end() >= len(part) or part[match.end()] != "{":
            return Found(None, "a \\boxed without braces")
        end = _closing(part, match.end())
        if end is None:
            return Found(None, _UNCLOSED)
        boxes.append((match.start(), end + 1, part[match.end() + 1 : end]))
        position = end + 1
        if len(boxes) > MAX_BOXES:
            return Found(None, f"more than {MAX_BOXES} boxes")
    if not boxes:
        return Found(None, "no \\boxed{} outside code and comments")
    texts = [_unwrap(content) for _, _, content in boxes]
    if any(_BOX.search(text) for text in texts):
        return Found(None, "a box inside a box")
    try:
        canonical = [normalise(text) for text in texts]
        if any(not _same(canonical[-1], other) for other in canonical[:-1]):
            return Found(None, f"{len(boxes)} boxes with different values")
        last = canonical[-1]
    except Unreadable as refused:
        return Found(None, f"refused: {refused}")
    if not last:
        return Found(None, "the box is empty")
    for start, _, _ in boxes:
        before = part[max(0, start - 200) : start]
        if _STRUCK.search(before):
            return Found(None, "the box is struck out or hidden")
        if _DENIED.search(before):
            return Found(None, "the text in front of the box denies it")
    after = part[boxes[-1][1] : boxes[-1][1] + 5_000]
    if _RETRACTED.search(after):
        return Found(None, "the text behind the box takes it back")
    for stated in _RESTATED.finditer(after):
        number = _STATED_NUMBER.match(stated["value"])
        if number and not _same(last, normalise(number.group(1).rstrip(".,"))):
            if rational(last) is not None or number.end() == len(stated["value"].rstrip(" .$*)")):
                return Found(None, "the text behind the box states another value")
    if re.match(r"\s*(?:\$|\\\))?\s*(?:\\pm|\+/?-|±|\\cdot|\\times|[-+*/^×÷!]|\\?%|or\b|\\text\{\s*or)\s*[\d\\({$]", after):
        return Found(None, "the expression goes on behind the box")
    return Found(texts[-1].strip(), "the last \\boxed{}")


def _closing(text: str, opening: int) -> int | None:
    depth, position = 0, opening
    limit = min(len(text), opening + MAX_BOX_CHARACTERS)
    while position < limit:
        character = text[position]
        if character == "\\":
            position += 2
            continue
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _unwrap(content: str) -> str:
    """A box that holds nothing but a box is that box."""
    for _ in range(3):
        match = _BOX.match(content.strip())
        if match is None:
            return content
        inner = content.strip()
        end = _closing(inner, match.end()) if inner[match.end() : match.end() + 1] == "{" else None
        if end != len(inner) - 1:
            return content
        content = inner[match.end() + 1 : end]
    return content


def _same(one: str, other: str) -> bool:
    if key(one) == key(other):
        return True
    first = rational(one)
    return first is not None and first == rational(other)
