"""The template's tags: once, in order, nothing outside."""

from __future__ import annotations

import re
from typing import Literal

from rewards.score import Score

ThinkTag = Literal["either", "in_prompt", "in_completion"]
_TAG = re.compile(r"<\s*(/?)\s*(think|answer)\b[^<>]{0,64}>", re.I)
_CLOSING = ["</think>", "<answer>", "</answer>"]


def format_reward(completion: str, think_tag: ThinkTag = "either", end_of_text: str = "") -> Score:
    """1 when the completion is `<think> ... </think> <answer> ... </answer>` and nothing else, 0 otherwise.

    The accuracy reward's companion in R1-Zero (arXiv 2501.12948, section 2.2). `think_tag` says where the opening
    `<think>` stands: `in_prompt` when the prompt already ends with it, so that the completion must not repeat it,
    `in_completion` when the completion must begin with it, `either` when both count. Every tag must occur exactly once,
    in order; the reasoning and the answer must not be blank; only white space may stand between and around them. A
    spelling such as `< Think >` counts as a tag, so it cannot smuggle a second one in. `end_of_text` is a stop token
    that the engine leaves in the text and that may follow. Raises ValueError for an unknown `think_tag`.
    """
    if think_tag not in ("either", "in_prompt", "in_completion"):
        raise ValueError(f"think_tag is {think_tag!r}; expected 'either', 'in_prompt' or 'in_completion'")
    text = completion.strip()
    if end_of_text and text.endswith(end_of_text):
        text = text[: -len(end_of_text)].rstrip()
    tags = list(_TAG.finditer(text))
    names = [tag.group() for tag in tags]
    opened = names[:1] == ["<think>"] and tags[0].start() == 0
    if opened and think_tag != "in_prompt":
        start, tags, names = tags[0].end(), tags[1:], names[1:]
    elif think_tag == "in_completion":
        return _no("the completion does not begin with <think>")
    else:
        start = 0
    if names != _CLOSING:
        return _no(f"expected the tags {_CLOSING}, each once and in order, found {names[:8]}")
    close_think, open_answer, close_answer = tags
    if text[close_think.end() : open_answer.start()].strip():
        return _no("text between </think> and <answer>")
    if text[close_answer.end() :].strip():
        return _no("text after </answer>")
    if not text[start : close_think.start()].strip():
        return _no("the reasoning is blank")
    if not text[open_answer.end() : close_answer.start()].strip():
        return _no("the answer is blank")
    return Score(1.0, "correct")


format_reward.expects = (  # type: ignore[attr-defined]
    "<think>...</think> <answer>...</answer> and nothing else, each tag once"
)


def _no(why: str) -> Score:
    return Score(0.0, "wrong", detail=why)
