"""One value out of a short phrase such as "There are 30 cars left.", which R1-Zero's template holds without a box.

One value is an answer. Several values, a denial, a choice, a bound or an approximation are none.
"""

from __future__ import annotations

import re

from rewards.extract import cut_at_end
from rewards.math.answer import NUMBER_WORDS, Group, Unread, Value, Words, read
from rewards.math.equality import decide
from rewards.math.normal import Unreadable, closing, normalise
from rewards.math.units import measured

MAX_CHARACTERS = 400
_LEAD = re.compile(
    r"\s*(?:\*\*)?(?:(?:so|thus|hence|therefore|then|finally),?\s+)?(?:the\s+|my\s+|our\s+)?(?:final\s+|correct\s+|right\s+)?"
    r"(?:answer|result|value|solution|option|choice|total|sum|it)(?:\s+choice|\s+option)?(?:\s+is|\s+equals|\s*[:=])"
    r"\s*(?:\*\*)?:?\s*(?:choice\s+|option\s+)?|\s*(?:option|choice)\s+",
    re.I,
)
_REFUSED = re.compile(
    r"n['’]t\b|[?<>≤≥≠±≈~]|\.\.\.|…|\\(?:pm|mp|ne|neq|le|leq|ge|geq|lt|gt|approx|sim|in|to)(?![a-zA-Z])"
    r"|\b(?:not|never|no|none|neither|nor|cannot|isnt|wrong|incorrect|false|invalid|except|excluding|unless|or|either"
    r"|maybe|perhaps|possibly|might|may|could|if|whether|suppose|supposing|assume|assuming|instead|rather|but|however"
    r"|although|though|actually|wait|oops|sorry|correction|between|ranges?|minimum|maximum|unlike|other than"
    r"|different from|far from|short of|rul(?:e|es|ed|ing) out|reject(?:s|ed)?|disregard|ignore|guess|unknown"
    r"|impossible)\b",
    re.I,
)
_NUMBER = r"(?:(?:US)?\\?[$€£¥₹] ?)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
_WORDS = "|".join(
    sorted(NUMBER_WORDS, key=len, reverse=True)
    + "hundred thousand million billion dozen half halves thirds? quarters? twice double triple thrice once".split()
)
_VALUE = re.compile(
    r"(?P<formula>(?<![\\$])\$\$?(?=[^\s$])(?:[^$\\]|\\.)+?(?<!\s)\$\$?(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|(?<![\w.])-?\d*\\(?:[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|sqrt\s*\{[^{}]*\})(?:\s*\\pi)?)"
    r"|(?P<ordinal>\b\d+(?:st|nd|rd|th)\b)"
    rf"|(?P<chain>(?<![\w.]){_NUMBER}%?(?:\s*[-+*/×x·÷=−–]\s*{_NUMBER}%?)*\s*=\s*-?{_NUMBER}(?![\w/]))"
    rf"|(?P<number>(?<![\w.])[-−]?{_NUMBER}(?:(?:\s\d+)?/\d+)?(?::\d\d)?(?:\s?\\?%)?(?:\s?(?:[-–−]|to)\s?{_NUMBER})?)"
    r"|(?P<latex>\\[a-zA-Z]+)"
    rf"|(?P<word>\b(?:{_WORDS})(?:[- ](?:{_WORDS}))*\b)"
    r"|(?P<name>\w*\d\w*)",
    re.I | re.S,
)
_ANSWER = re.compile(r"\banswer(?: is|:)", re.I)
_LAST = re.compile(
    r"(?<!\\)\$\$.+?\$\$|(?<!\\)\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]"
    rf"|(?<![\w.])-?{_NUMBER}(?:/\d+)?\s?(?:%|percent|pct|€|\$)?",
    re.S,
)
_BOUND = re.compile(
    r"\b(?:about|around|approximately|roughly|nearly|almost|over|under|above|below|past|beyond|least|most|than|up to|to"
    r"|minus|negative|plus|times|by|exceeds?|until|within)\s+(?:a |the |only )?\**$",
    re.I,
)
_CHANGED = re.compile(
    r"\**\s*(?:times|squared|cubed|plus|minus|mod|factorial|over|divided|multiplied|out of|in base|base|st\b|to the)\b"
    r"|\s*(?:[-+/^!=×÷]|\*(?!\*))",
    re.I,
)
_SENTENCE = re.compile(r"\b(?:is|are|was|were|has|have|there|it|he|she|they|we)\b", re.I)
_UNIT = re.compile(r"\**\s?((?:[A-Za-z°$€£¥¢][A-Za-z.²³/]*(?:\^\{?\d\}?)?[ -]?){1,4})")


def stated_value(text: str) -> str | None:
    """The one value that a phrase states, with the unit behind it; the text itself where it is nothing but an answer;
    None where there is no value, or not one alone."""
    rest = text[lead.end() :] if (lead := _LEAD.match(text)) else text
    rest = rest.strip().removesuffix("**").strip()
    if _is_answer(rest):
        return rest
    if len(rest) > MAX_CHARACTERS or _REFUSED.search(rest):
        return None
    values: list[str] = []
    for match in _VALUE.finditer(rest):
        if match.lastgroup == "ordinal":
            continue
        found = _value(match, rest[: match.start()], rest[match.end() :])
        if found is None:
            return None
        values.append(found)
    if not values or any(not decide(values[0], other).equal for other in values[1:]):
        return None
    return max(values, key=len)


def last_value(text: str) -> str:
    """The boxes of running text, else the last formula or number behind the last "answer"; the text without any.
    For comparing texts that are trusted: a reward reads more strictly."""
    boxes = [text[m.end() : closing(text, m.end() - 1)] for m in re.finditer(r"\\boxed\{", text)]
    if boxes:
        return ", ".join(dict.fromkeys(boxes))
    rest = cut_at_end(text)
    values = list(_LAST.finditer(rest, max((m.end() for m in _ANSWER.finditer(rest)), default=0)))
    return values[-1].group() if values else text


def _is_answer(text: str) -> bool:
    """Whether the whole text reads as an answer: not as words of a sentence, nor with a word behind it that counts
    nothing."""
    try:
        answer = read(normalise(text))
    except (Unread, Unreadable):
        return False
    parts = answer.parts if isinstance(answer, Group) else (answer,)
    if any(isinstance(part, Words) for part in parts):
        return not any(c.isdigit() for c in text) and not _SENTENCE.search(text)
    return all(not isinstance(part, Value) or part.unit.countable for part in parts)


def _value(match: re.Match[str], before: str, after: str) -> str | None:
    """The text of one value, with its unit; None for what is no plain value where it stands."""
    kind, text = match.lastgroup, match.group()
    if kind in ("latex", "name") or _BOUND.search(before) or _CHANGED.match(after):
        return None
    if kind == "word" and text.lower() not in NUMBER_WORDS:
        return None
    if kind == "chain":
        sides = re.sub(r"[$€£¥₹,%\\]|US", "", re.sub(r"(?<=[\d ])x(?=[ \d])", "*", text)).split("=")
        if any(not decide(sides[-1], side).equal for side in sides[:-1]):
            return None
        text = text.rpartition("=")[2].strip()
    if kind == "number" and re.search(r"\d\s?(?:[-–−]|to)\s?\D*\d", text):  # a range
        return None
    words = unit[1].split() if (unit := _UNIT.match(after)) else []
    for count in range(len(words), 0, -1):
        try:
            longer = f"{text} {' '.join(words[:count])}"
            quantity = measured(normalise(longer))
        except Unreadable:
            continue
        if words[count - 1].lower() == "in" and after.split()[count:]:  # "30 in all": no inches
            continue
        if (quantity.unit and quantity.unit.countable) or quantity.scale != 1:
            return longer.rstrip(" .")
    return text
