r"""What the text around a box does to it: strikes it out, denies it, takes it back, or makes it part of something
larger.
"""

from __future__ import annotations

import re

from rewards.math.equality import decide
from rewards.math.normal import Unreadable, normalise

BEFORE_CHARACTERS = 200
AFTER_CHARACTERS = 5_000

# Code, comments and struck text: not part of what is said. The box must not be looked for in it.
HIDDEN = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|<!--.*?(?:-->|\Z)|`[^`\n]*`"
    r"|\\begin\{(comment|verbatim|lstlisting)\}.*?(?:\\end\{\1\}|\Z)"
    r"|<(del|s|strike|script|style|title|template)\b[^<>]{0,64}>.*?(?:</\2>|\Z)"
    r"|^[ \t]*%[^\n]*|(?<=[^\d\s\\$%])[ \t]+%[^\n]*",
    re.S | re.M | re.I,
)
_STRUCK = re.compile(
    r"(?:\\(?:x|b)?cancel|\\sout|\\st|\\[hv]?phantom|\\text(?:color)?\{white\}|\\color\{white\})\s*\{[^{}]*$|~~[^~\n]*$"
)
_FILLER = (
    r"(?:be|been|equal(?:s|ly)?|to|simply|just|the|true|correct|final|right|answer|value|result|solution|is|was"
    r"|were|necessarily|"
    r"actually|exactly|really|a|an|that|it|x|as|of)"
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|isnt|no longer|hardly)|n['’]t|\b(?:rather than|instead of|other than"
    r"|anything but|"
    r"everything but|all but|except(?: for)?|unlike|excluding|different from|far from|wrong|incorrect|false|invalid"
    r"|suppose|assume|"
    r"assuming|supposing|if|whether|unless|rul(?:e|es|ed|ing) out|exclud(?:es|ed|e)|eliminat(?:es|ed|e|ing)"
    r"|reject(?:s|ed|ing)?|"
    r"discard(?:s|ed|ing)?|avoid|(?:some|someone|others|people|many|friend|students?|naively)\s*(?:might|may|would|"
    r"could|will|can)?\s*(?:say|says|said|think|thinks|thought|claim|claims|guess|guessed|believe|answer|answered"
    r"|get|gets|got)|"
    r"naive answer|tempting answer|common mistake)|\\neq?\b|≠|!=)"
    rf"[\s$:*\\(\[,=\"“'‘]*(?:{_FILLER}\b[\s$:*\\(\[,=\"“'‘]*){{0,6}}$",
    re.I,
)
_RETRACTED = re.compile(
    r"^[\s$\\)\]*.]*\?|\bno\s*[,:;.!]|\b(?:wait|actually|oops|hmm+|scratch that|on second thought|(?:i"
    r"|we) was wrong|my mistake|"
    r"i made (?:a|an) (?:mistake|error)|correction|disregard|retract|let me (?:re|double|correct|fix|try)"
    r"|should (?:instead )?be|"
    r"should have been|(?:is|was|are|seems?|looks?|would be|must be|were) (?:also )?(?:not (?:correct|right|the"
    r"|valid|possible|an? )|wrong|"
    r"incorrect|false|invalid|a mistake|impossible|too (?:large|small|big|high|low|many|few|long|short)"
    r"|an? (?:lower|upper) bound|"
    r"off by|ruled out|excluded|only an? )|isn['’]?t (?:correct|right|the|valid|possible)|can(?:no|['’])t be|"
    r"(?:this|that|it)(?: is|['’]s) not|not the (?:final |right |correct )?answer|does(?: not|n['’]t)|do(?: not"
    r"|n['’]t) (?:think|believe|trust)|"
    r"(?:fails?|failed) (?:the|this|to|check)|contradict|"
    r"(?:but|yet|however|though|although) (?:that|this|it|i|my|we|the (?:truth|correct|real|actual|true|final|right"
    r"|answer))\b|"
    r"(?:alternatively|otherwise|maybe|perhaps|possibly|also|leaving|except)\b[^.\n]{0,20}\d|"
    r"(?:also|another|other|second|equally)\b[^.\n]{0,24}\b(?:possible|answers?|solutions?|values?|possibilit|valid"
    r"|works)|"
    r"changed? my mind|ignore (?:this|that|the)|sorry|just kidding|not really)",
    re.I,
)
_RESTATED = re.compile(
    r"\b(?:answer|result|value|total|sum|it|that|this)(?:['’]s|\s*(?:\bis\b|\bequals?\b|:"
    r"|=))[\s*:]*(?P<value>[^\n]{1,80})",
    re.I,
)
# What follows must be the value of the box once more.
_AGAIN = re.compile(
    r"(?:\b(?:real|actual|true|correct|final|right) (?:answer|value|result)(?: is|:)"
    r"|\bor(?! (?:about|approximately|roughly|equivalently|simply|around|in other|just|\$?\\approx|≈))"
    r"(?=[^.\n]{0,20}\d))"
    r"(?P<value>[^\n]{0,80})",
    re.I,
)
_STATED_NUMBER = re.compile(
    r"(?:is |equals |just |exactly |about |therefore )*[$\\(\[*\s]*"
    r"(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\\[dt]?frac\s*\{[^{}]*\}\{[^{}]*\})"
)
_FORMULA = re.compile(
    r"[\s*:,]*(?:(?:is|equals|just|simply|exactly|therefore|thus|again)\b[\s:]*)*"
    r"(?:\$\$?([^$]+)\$|\\\((.+?)\\\)|\\boxed\{([^{}]+)\}|([-−]?\\?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s?\\?%?)"
    r"|(\\[dt]?frac\s*(?:\{[^{}]*\}\s*\{[^{}]*\}|\d\d)))"
)
# Right in front of the box: an operator, a relation that is no equation, a digit, the opening brace of a command.
_OPERATOR_BEFORE = re.compile(
    r"(?:[+/^_<>!·×÷⋅√½¼¾]|(?<!\*)\*(?!\*)|\\(?:cdot|times|div|pm|mp|le|leq|leqslant|ge|geq|geqslant|lt|gt|sqrt|frac|dfrac"
    r"|tfrac|neg|lnot|not|notin|cup|cap|"
    r"setminus|ll|gg|sim|equiv|mid|sin|cos|tan|ln|log|exp)(?:\\left)?|(?<![A-Za-z])[A-Za-z](?=\()|\d|(?:^|[$=(\[{,]|\d)\s*-)\s*[$({]*\s*$|-$|\}\s*\{$"
)
_BRACE_BEFORE = re.compile(
    r"(?:\\([a-zA-Z]+)|([\^_]))\s*(?:\[[^\]]*\])?\s*\{\s*(?:\\(?:displaystyle|bf|large|Large)\s*)?$"
)
_DRESS = frozenset(
    (
        "text textbf mathbf mathrm bf large Large huge Huge underline fbox colorbox color textcolor "
        "displaystyle emph boldsymbol bm"
    ).split()
)
_MAY_FOLLOW = frozenset(
    "text textbf mathrm mbox quad qquad hspace vspace end blacksquare square qed Box tag hfill boxed checkmark"
    " par newline tfrac "
    "implies Rightarrow because therefore label nonumber left right big Big bigl bigr \\".split()
)
_SCALES = re.compile(
    r"(?:\\text\w*\{|\\mathrm\{|\\mbox\{)?\s*(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed"
    r"|factorial|mod|base)\b",
    re.I,
)


def spoken_against(part: str, start: int, end: int, value: str, last: bool) -> str | None:
    """Why the box at `part[start:end]` is not the answer; None when nothing speaks against it.

    `value` is what it holds, canonical; `last` says that no other box follows, so that what follows is read too.
    """
    before, after = part[max(0, start - BEFORE_CHARACTERS) : start], part[end : end + AFTER_CHARACTERS]
    if _STRUCK.search(before):
        return "the box is struck out or hidden"
    if _DENIED.search(before):
        return "the text in front of the box denies it"
    line = before.rpartition("\n")[2]
    brace = _BRACE_BEFORE.search(before)
    if brace and (brace[1] or "^") not in _DRESS:
        return "the box is an argument of something larger"
    if _OPERATOR_BEFORE.search(line) and not re.fullmatch(
        r"\s*(?:[-*+>|](?=\s)|\d+[.)])[\s>*|]*\$*\s*", line
    ):  # a list item, a quote
        return "the box is part of a larger expression"
    if _goes_on(after, value):
        return "the expression goes on behind the box"
    return _taken_back(after, value) if last else None


def _goes_on(after: str, value: str) -> bool:
    if re.match(r"[0-9A-Za-z_{²³½¼¾⅓⅔⁰-⁹]|[.:]\d|,\d{3}|[ \t]+\d{3}(?!\d)|(?:\\[,;:! ]|~|\{,\})+\s*\d", after):
        return True
    closed = re.match(r"\s*(?:(?:\\right\s*)?[)\]|]\s*)+", after)
    if closed and re.match(
        r"(?:\^(?!\s*\{?\s*\\circ)|_|![\s$]*$|\d|\\(?:cdot|times|div)|[*/]|[-+]\s*\d)", after[closed.end() :]
    ):
        return True
    text = after.lstrip(" \t")
    if text.startswith("^"):
        return re.match(r"\^\s*\{?\s*(?:\\circ|\\degree|°)", text) is None
    if re.match(r"[-+*/×÷±<>=≠≤≥|&_{!%\\]", text) is None or re.match(
        r"!(?:\s|$)|\*\*|\||-\s*[A-Za-z]|--|>\s|<[/a-zA-Z]", text
    ):
        return _SCALES.match(text) is not None
    if re.match(r"\\?%", text):
        return re.match(r"\\?%\s*[\d({]", text) is not None
    command = re.match(r"\\(?:([a-zA-Z]+)|(.))", text, re.S)
    if command is None:
        return not re.match(r"=\s*\\?(?:boxed)", text) and not _restates(text, value)
    if command[2] is not None:
        return command[2] not in ")],;:! \\$\n}"
    if command[1] in ("text", "textbf", "mathrm", "mbox"):
        body = re.match(r"\\\w+\s*\{([^{}]*)\}", text)
        words = body[1].strip() if body else "or"
        return _SCALES.match(words) is not None or re.match(r"(?:or|plus|minus|times|not|over)\b", words) is not None
    return command[1] not in _MAY_FOLLOW


def _restates(text: str, value: str) -> bool:
    """Whether what follows is the same value once more, as in `\\boxed{1/2} = 0.5`."""
    match = re.match(r"=\s*([^$\n]{1,60}?)\s*(?:\$|\\\)|\\\]|[.,]?\s*$|[.,]\s)", text)
    return match is not None and _same(value, match[1])


def _taken_back(after: str, value: str) -> str | None:
    if _RETRACTED.search(after):
        return "the text behind the box takes it back"
    for again in _AGAIN.finditer(after):
        formulas = _FORMULA.match(again["value"])
        if not formulas or not any(_same(value, text.strip().rstrip(".")) for text in formulas.groups() if text):
            return "the text behind the box takes it back"
    for stated in _RESTATED.finditer(after):
        number = _STATED_NUMBER.match(stated["value"])
        if number and not _same(value, number[1].rstrip(".,")):
            if decide("0", value).rule == "exact rational" or number.end() == len(stated["value"].rstrip(" .$*)")):
                return "the text behind the box states another value"
    return None


def _same(one: str, other: str) -> bool:
    try:
        return same_value(one, normalise(other))
    except Unreadable:
        return False


def same_value(one: str, other: str) -> bool:
    """Whether two canonical texts state the same value, units aside."""
    return decide(one, other).equal or decide(other, one).equal
