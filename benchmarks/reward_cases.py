"""Generated cases for the math reward: other spellings of gold answers, near misses of them, and sentences that state
one value or do not. Made from golds by rules, one change at a time, so that the right verdict is known.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

Case = tuple[str, str, str]  # kind, gold, what is in the box (for a sentence: in <answer>)

_TEXT = re.compile(r"\\(?:text|mbox|textnormal|mathrm)\{([^{}]*)\}")
_OTHER_UNIT = {
    "inches": "feet", "inch": "foot", "feet": "yards", "foot": "inches", "cm": "mm", "centimeters": "meters",
    "miles": "kilometers", "mile": "kilometer", "mph": "kph", "hours": "minutes", "hour": "minute", "minutes": "hours",
    "min": "s", "days": "weeks", "degrees": "radians", "dollars": "euros", "euros": "dollars", "cents": "dollars",
    "pounds": "kilograms", "gallons": "liters", "acres": "hectares", "units": "cm", "USD": "EUR", "meters": "feet",
    "square": "cubic", "cubic": "square", "sq": "cubic", "sq.": "cubic", "p.m.": "a.m.", "odd": "even", "even": "odd",
    "red": "green", "m": "km", "kg": "g", "liters": "gallons", "seconds": "minutes",
}  # fmt: skip
_LONG = {
    "cm": "centimeters", "centimeters": "cm", "inches": "in", "feet": "ft", "miles": "mi", "hours": "hr", "days": "day",
    "pounds": "lb", "gallons": "gal", "sq": "square", "square": "sq", "minutes": "min", "min": "minutes",
    "dollars": "USD", "degrees": "degree", "mph": "miles per hour", "meters": "m", "seconds": "s", "kg": "kilograms",
}  # fmt: skip

# Golds of kinds that MATH has few of.
MORE_GOLDS = [
    r"60^\circ, 120^\circ", r"2\text{ hours }30\text{ minutes}", r"3\text{ red, }4\text{ blue}", r"\$1.50",
    r"45^\circ\le x\le72^\circ", "2,10", "1,2", "0.5", r"\sqrt8=2\sqrt2", "x>2^{-99}", r"0.56=56\%", "25 km/h",
    r"18\pi\text{ cm}^2", r"\frac{9}{4}\text{ m/s}^2", "$8$,$4$", "ABC", "66_{(8)}", r"\$42", "€12.50", "£3", "1+2i",
    r"\begin{pmatrix}1\\2\end{pmatrix}", "2^6 3^5 5^4", r"5\text{ ft }7\text{ in}", r"x=3,\ y=-2", "(3,-2)",
    r"\{2,5,7\}",
    r"x\in(-3,4]", r"-1\le x<4", r"x\ne 3", r"(-\infty,2]\cup(5,\infty)", r"y=\frac{3}{4}x-2", r"x^2+y^2=25",
    r"3x-4y+5=0", r"2.4\times10^{-3}", r"7\times 10^{5}\text{ kg}", r"3\frac{1}{7}", r"12.5\%", r"1:4:9", "8:05",
    r"\text{Tuesday}", r"\text{Maria}", r"\text{(B)}", "D", r"101_2", r"3A_{16}", r"\frac{\sqrt{3}+1}{2}",
    r"\frac{x+1}{x-2}", r"(x-1)^2(x+3)", r"\ln 2", r"e^{2x}", r"2\cos x", r"\frac{2\pi}{3}", r"\sqrt[3]{4}",
    r"a^2-b^2", r"-\frac{7}{3}", r"1{,}250{,}000", "3.75", r"\frac{1}{3}", r"15\text{ apples}", r"90\text{ km/h}",
    r"4\text{ m}^3", r"3\text{ pounds }5\text{ ounces}", r"\text{A, C}", r"10^{-9}", r"2-\sqrt{5}, 2+\sqrt{5}",
    r"|x|+1", r"n(n+1)", r"\frac{n(n+1)}{2}", r"\log_2 5", r"5!", r"\binom{10}{3}", r"\pm 4", r"f(x)=2x+1", r"AB=7",
    r"\begin{bmatrix}1&0\\-2&3\end{bmatrix}", r"36\pi", r"[0,1)", r"30\text{ and }40", r"\frac{5}{8}\text{ inch}",
]  # fmt: skip


def has_parts(gold: str) -> bool:
    """Whether a gold is more than one bare value: words, units, several parts, relations."""
    bare = re.sub(r"\\(?:frac|sqrt|dfrac|tfrac|left|right|pi|cdot|!|,(?=\\!))", "", gold)
    return re.search(r"\\[a-zA-Z%$]|[=<>:;%$€£_°]|,|[a-zA-Z]{2,}|&", bare) is not None


def near_misses(gold: str) -> Iterator[Case]:
    """Wrong answers that differ from the gold in one digit, sign, letter, unit, bracket or part."""
    seen = {gold}

    def case(kind: str, text: str) -> Iterator[Case]:
        if text not in seen:
            seen.add(text)
            yield kind, gold, text

    hidden = [m.span() for m in re.finditer(r"\\[a-zA-Z]+(?:\{[a-z]*(?:matrix|array)\})?", gold)]
    inside = lambda at: any(start <= at < stop for start, stop in hidden)  # noqa: E731
    for match in re.finditer(r"\d", gold):
        at = match.start()
        for step in (1, 4):
            digit = str((int(match.group()) + step) % 10)
            if not (digit == "0" and gold[max(0, at - 1) : at] in ("", " ")):
                yield from case("digit", gold[:at] + digit + gold[at + 1 :])
    for match in re.finditer(r"(?<![\d.])\d+", gold):
        yield from case("digit added", gold[: match.end()] + "7" + gold[match.end() :])
        if len(match.group()) > 1 and not re.match(r"[.]", gold[match.end() :]):
            yield from case("digit dropped", gold[: match.end() - 1] + gold[match.end() :])
    for match in re.finditer(r"(?<![\d.{_^])(?:\d+)(?!\s*(?:\}|_))", gold):
        if re.search(r"(?:^|[,(\[=<>+{;&]|\\\\|\\le|\\ge)\s*$", gold[: match.start()]) and match.group() != "0":
            yield from case("sign", gold[: match.start()] + "-" + gold[match.start() :])
    for match in re.finditer(r"-(?=\d|\\frac|\\sqrt)", gold):
        yield from case("sign", gold[: match.start()] + "+" + gold[match.end() :])
    for match in _TEXT.finditer(gold):
        words = match.group(1).split()
        for i, word in enumerate(words):
            bare = word.strip(".,")
            if bare in ("and", "or", ""):
                continue
            other = _OTHER_UNIT.get(bare) or (bare[:-1] + ("x" if bare[-1] != "x" else "z") if len(bare) > 1 else None)
            if len(bare) == 1 and bare.isupper():
                other = "B" if bare != "B" else "C"
            if other:
                said = " ".join([*words[:i], word.replace(bare, other), *words[i + 1 :]])
                text = match.group().replace(match.group(1), f" {said} ")
                yield from case("unit or word", gold[: match.start()] + text + gold[match.end() :])
    for old, new in (
        (r"\\\$", "€"), (r"\\\$", "£"), ("€", r"\\$"), ("£", "€"), (r"\}\^2$", "}^3"), (r"\}\^3$", "}^2"),
        (r"\\circ", r"\\text{ radians}"), (r"km/h", "m/s"), (r"km/h", "km"), (r"km/h", "mi/h"), (r"\\le(?![a-z])", "<"),
        (r"\\leq", "<"), (r"\\leq", r"\\geq"), (r"<", r"\\le "), (r"<", ">"), (r">", "<"), (r">", r"\\ge "),
        (r"\\ne(?![a-z])", "="), (r"\\cup", r"\\cap"), (r"\\sin", r"\\cos"), (r"\\cos", r"\\sin"), (r"\\tan", r"\\cot"),
        (r"\+", "-"), (r"\\sqrt", ""), (r"\\pi", ""), (r"\\infty", "100"), (r"\\pm", "+"), (r"(?<=\d)\\%", r"7\\%"),
        (r"m/s\}\^2", "m/s}"), (r"\\log_2", r"\\log_3"),
    ):  # fmt: skip
        for match in re.finditer(old, gold):
            yield from case("mark", gold[: match.start()] + match.expand(new) + gold[match.end() :])
    if re.search(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]", gold) and "f(" not in gold:
        for old, new in (("(", "["), ("[", "("), (")", "]"), ("]", ")")):
            for match in re.finditer(re.escape(old), gold):
                inner = gold[match.start() :]
                if re.match(r"[(\[]?[^()\[\]]*,", inner) or old in ")]":
                    yield from case("bracket", gold[: match.start()] + new + gold[match.end() :])
    for match in re.finditer(r"(?<![a-zA-Z\\{])[a-zA-Z](?![a-zA-Z}])", gold):
        if match.group() not in "ei" and not inside(match.start()) and "km/h" not in gold:
            other = "w" if match.group() != "w" else "v"
            other = other.upper() if match.group().isupper() else other
            if len(re.findall(rf"(?<![a-zA-Z\\]){match.group()}(?![a-zA-Z])", gold)) > 1 or "=" not in gold:
                yield from case("letter", gold[: match.start()] + other + gold[match.end() :])
    if re.fullmatch(r"[A-Z]{2,}", gold):
        yield from case("case", gold.lower())
        yield from case("letters turned", gold[::-1])
    inner = re.fullmatch(r"(.*?[(\[{])?([^()\[\]{}]+(?:,[^()\[\]{}]+)+)(\\?[)\]}])?", gold)
    if inner and "\\text" not in gold and not re.search(r"\d,\\?!?\s?\d{3}(?!\d)", gold):
        parts = inner.group(2).split(",")
        left, right = inner.group(1) or "", inner.group(3) or ""
        if len(parts) > 2 or not left:
            yield from case("part dropped", left + ",".join(parts[:-1]) + right)
            yield from case("part dropped", left + ",".join(parts[1:]) + right)
        yield from case("part added", left + ",".join([*parts, " 97"]) + right)
        if left in ("(", "[") and parts[0].strip() != parts[-1].strip():
            yield from case("order", left + ",".join(parts[::-1]) + right)
    fraction = re.fullmatch(r"(.*)\\frac\{(\d+)\}\{(\d+)\}(.*)", gold)
    if fraction and fraction[2] != fraction[3]:
        yield from case("turned fraction", rf"{fraction[1]}\frac{{{fraction[3]}}}{{{fraction[2]}}}{fraction[4]}")
    if re.fullmatch(r"-?\d+(?:\.\d+)?", gold):
        yield from case("scale", f"{gold}\\text{{ million}}") if gold != "0" else ()
        yield from case("list", f"{gold}, 1")


def spellings(gold: str) -> Iterator[Case]:
    """The gold answer as other hands would write it."""
    seen = {gold}

    def case(kind: str, text: str) -> Iterator[Case]:
        if text not in seen:
            seen.add(text)
            yield kind, gold, text

    yield from case("same", f" {gold} ")
    whole = re.fullmatch(r"[\d\w\\{}^+\-* ]+", gold) and not re.search("text|_|box|begin|circ|in|le|ne|ge", gold)
    yield from case("dollars", f"${gold}$") if "$" not in gold else ()
    yield from case("brackets", f"\\({gold}\\)") if "$" not in gold else ()
    for kind, old, new in (
        ("dfrac", r"\\frac", r"\\dfrac"), ("tfrac", r"\\d?frac", r"\\tfrac"), ("sizes", r"\(", r"\\left("),
        ("spaces", r"(?<=[\d}])([+\-=])(?=[\d\\a-z])", r" \1 "), ("spaces", ", *", ",\\\\ "), ("spaces", ", *", ", "),
        ("text", r"\\text\{", r"\\mbox{"), ("text", r"\\text\{", r"\\textrm{"), ("text", r"\\text\{", r"\\mathrm{"),
        ("text", r"\\mbox\{", r"\\text{"), ("degrees", r"\^\{?\\circ\}?", "°"), ("pi", r"\\pi(?![a-z])", "π"),
        ("degrees", r"\^\{?\\circ\}?", r"^{\\circ}"), ("minus", "-(?![a-z])", "−"),
        ("root", r"\\sqrt\{(\d+)\}", r"√\1"),
        ("root", r"\\sqrt\{(\d)\}", r"\\sqrt\1"), ("root", r"\\sqrt\{(\d)\}", r"\\sqrt \1"), ("percent", r"\\%", "%"),
        ("percent", r" ?\\%", r"\\text{ percent}"), ("percent", r" ?\\%$", " percent"),
        ("le", r"\\le(?![a-z])", r"\\leq"),
        ("le", r"\\leq?(?![a-z])", "≤"), ("le", r"\\leq?(?![a-z])", r"\\leqslant"), ("infinity", r"\\infty", "∞"),
        ("cup", r" ?\\cup ?", r"∪"), ("cdot", r"(\d)\\pi", r"\1\\cdot\\pi"), ("times", r"\\times", "×"),
        ("fraction", r"(?<!\d)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1/\2"), ("power", r"\^\{(\w)\}", r"^\1"),
        ("power", r"\^(\d)(?!\d)", r"^{\1}"), ("power", r"\^2(?!\d)", "²"), ("thousands", r",\\! ?", ","),
        ("thousands", r",\\! ?", "{,}"), ("thousands", r",\\! ?", ""), ("thousands", r",\\! ?", r"\\,"),
        ("matrix", "pmatrix", "bmatrix"), ("matrix", "bmatrix", "pmatrix"), ("matrix", r"\\\\", r"\\\\\n"),
        ("matrix", r" *& *", " & "), ("base", r"_\{?\(?(\d+)\)?\}?$", r"_{\1}"),
        ("base", r"_\{?\(?(\d+)\)?\}?$", r"_{(\1)}"),
        ("currency", r"\\\$ ?", "$"), ("currency", r"\\\$ ?", r"\\$\\,"), ("currency", r"^\\\$ ?([\d.,!\\]+)$", r"\1"),
        ("currency", r"^\\\$ ?([\d.]+)$", r"\1\\text{ dollars}"), ("currency", r"^\\\$ ?([\d.]+)$", r"\1 dollars"),
        ("currency", r"^€([\d.]+)$", r"\1\\,€"), ("currency", r"^€([\d.]+)$", r"\1\\text{ euros}"),
        ("choice", r"^(?:\\text\{)?\(?([A-J])\)?\}?$", r"(\1)"), ("choice", r"^(?:\\text\{)?\(?([A-J])\)?\}?$", r"\1"),
        ("choice", r"^(?:\\text\{)?\(?([A-J])\)?\}?$", r"\\text{\1}"),
        ("choice", r"^(?:\\text\{)?\(?([A-J])\)?\}?$", r"\\textbf{(\1)}"),
        ("choice", r"^(?:\\text\{)?\(?([A-J])\)?\}?$", r"\1."),
        ("choice", r"^(?:\\text\{)?\(?([A-J])\)?\}?$", r"\\text{(\1) } 12"),
        ("words", r"^\\text\{([A-Za-z ]{3,})\}$", r"\1"), ("words", r"^\\text\{([A-Za-z ]{3,})\}$", r"\\textbf{\1}"),
        ("full stop", r"(?<!\.)$", "."), ("set", r"^\\\{(.*)\\\}$", r"\1"),
        ("sign of equality", r"^([a-zA-Z])\s*=\s*(.+)$", r"\2"), ("in", r"^x ?\\in ?(.+)$", r"\1"),
        ("degrees", r"^(\d+(?:\.\d+)?)\^\{?\\circ\}?$", r"\1"),
        ("degrees", r"^(\d+(?:\.\d+)?)\^\{?\\circ\}?$", r"\1 degrees"),
        ("degrees", r"^(\d+(?:\.\d+)?)\^\{?\\circ\}?$", r"\1\\text{ degrees}"), ("bold", r"^(\w+)$", r"\\mathbf{\1}"),
        ("decimals", r"^(-?\d+)$", r"\1.0"), ("decimals", r"^(-?\d+\.\d+)$", r"\g<1>0"),
        ("decimals", r"^0\.(\d+)$", r".\1"),
        ("decimal comma", r"^(-?\d+)\.(\d{1,2})$", r"\1,\2"), ("name", r"^(-?\d+)$", r"x = \1"),
        ("plus", r"^(\d+)$", r"+\1"),
        ("ratio", r"(\d+) ?: ?(\d+)", r"\1 : \2"), ("product", r"\)\(", r")\\cdot("),
        ("fraction of pi", r"\\frac\{\\pi\}\{(\d)\}", r"\\frac\\pi\1"),
        ("mixed", r"^(\d+)\\frac\{(\d+)\}\{(\d+)\}$", r"\1 \2/\3"),
        ("and", r"^([^,()\[\]{}]+),(?!\\?!? ?\d{3})([^,()\[\]{}]+)$", r"\1 \\text{ and } \2"),
        ("whole", r"^(.*)$", r"\\left(\1\\right)" ) if whole else ("same", "$", " "),
    ):  # fmt: skip
        changed = re.sub(old, new, gold)
        if kind == "sizes":
            changed = changed.replace(")", "\\right)") if gold.count("(") == gold.count(")") else gold
        if kind == "decimal comma" and re.fullmatch(r"-?\d+\.0+", gold):
            continue
        yield from case(kind, changed)
    if re.fullmatch(r"-?\d{4,}", gold):
        yield from case("thousands", f"{int(gold):,}")
        yield from case("thousands", f"{int(gold):,}".replace(",", "\\,"))
        yield from case("thousands", f"{int(gold):,}".replace(",", "{,}"))
        digits = gold.rstrip("0")
        if len(gold) - len(digits) > 2 and len(digits.lstrip("-")) == 1:
            yield from case("scientific", f"{digits} \\times 10^{{{len(gold) - len(digits)}}}")
    percent = re.fullmatch(r"(\d+) ?\\%", gold)
    if percent:
        yield from case("percent", str(int(percent[1]) / 100))
        yield from case("percent", percent[1])
    unit = re.fullmatch(r"(.*?)\\(?:text|mbox|textnormal)\{([^{}]*)\}(\^\d)?\.?", gold)
    if unit and unit[1].strip(" \\") and "\\text" not in unit[1] and "_" not in gold:
        value, words, power = unit[1].strip(" \\"), unit[2].split(), unit[3] or ""
        if not re.search(r"[:]|and|or", gold) and "(" not in value:
            yield from case("unit left out", value)
        if words and words[-1].strip(".") in _LONG and not power:
            said = " ".join([*words[:-1], _LONG[words[-1].strip(".")]])
            yield from case("other name of the unit", f"{value}\\text{{ {said}}}")
        if words and words[0] in ("square", "sq", "sq.") and len(words) > 1:
            yield from case("square", f"{value}\\text{{ {' '.join(words[1:])}}}^2")
        if re.fullmatch(r"[\d.,]+", value) and not power:
            yield from case("bare unit", f"{value} {' '.join(words)}")
            yield from case("all in the text", f"\\text{{{value} {' '.join(words)}}}")
    bare = re.fullmatch(r"-?\d+(?:\.\d+)?|-?\\frac\{\d+\}\{\d+\}|\d+\\pi", gold)
    if bare:
        for said in (r"\text{ cm}", r"\text{ apples}", r"\text{ km/h}", r"\text{ m}^2", r"\text{ square units}"):
            yield from case("unit added", gold + said)
    parts = [part.strip() for part in gold.split(",")]
    if len(parts) > 1 and not re.search(r"[()\[\]{}!]|\d,\d{3}(?!\d)", gold):
        yield from case("order of a list", ", ".join(parts[::-1]))
    interval = re.fullmatch(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])", gold)
    if interval and "[" in gold + "" and "]" in gold or (interval and "\\infty" in gold):
        low, high = interval[2].strip(), interval[3].strip()
        signs = ["\\le" if interval[1] == "[" else "<", "\\le" if interval[4] == "]" else "<"]
        if "infty" not in low + high:
            yield from case("interval as inequality", f"{low} {signs[0]} x {signs[1]} {high}")
    sides = re.fullmatch(r"([^=<>\\]+)(=|<|>)([^=<>]+)", gold)
    if sides and "f(" not in gold:
        turned = {"=": "=", "<": ">", ">": "<"}[sides[2]]
        yield from case("relation turned", f"{sides[3].strip()} {turned} {sides[1].strip()}")
    terms = re.fullmatch(r"([\d\\a-z{}]+)([+-])([\d\\a-z{}]+)", gold)
    if terms and "text" not in gold and "frac" not in gold:
        first = terms[3] if terms[2] == "+" else f"-{terms[3]}"
        yield from case("order of terms", f"{first}+{terms[1]}")


# {v}: the value, {n}: a counted noun, {u}: a value of the question that is not the answer
STATING = [
    "{v} {n}", "{v} {n}.", "{v} {n} left.", "There are {v} {n} left in the lot.", "Answer: {v} {n}", "Answer: {v}",
    "The answer is {v}.", "The final answer is {v} {n}.", "So the answer is {v} {n}.", "${v}$ {n}", "${v}$",
    "\\({v}\\) {n}.",
    "\\[{v}\\]", "She has {v} {n}.", "He sold {v} {n} in total.", "Tom has {v} {n} now.", "Total: {v} {n}",
    "The total is {v}.", "Therefore, there are {v} {n}.", "Thus she needs {v} more {n}.", "**{v}**", "**{v} {n}**",
    "The answer is **{v}**.", "It takes {v} {n}.", "In total, they bought {v} {n} altogether.", "x = {v}", "$x = {v}$",
    "Result: {v}", "The number of {n} is {v}.", "{v} {n} remain.", "They will need {v} {n} for the party.", "= {v}",
    "Mary ends up with {v} {n} after giving some away.", "The total number of {n} is ${v}$.", "Final answer: {v}",
    "A total of {v} {n} were sold on Monday.", "Each child gets {v} {n}.", "There are {v}.", "Hence {v} {n}.",
    "{v} is the answer.", "The answer is {v}", "{v}.", "{v} {n} each", "Yes, she has {v} {n}.", "I get {v} {n}.",
    "John's total is {v} {n}.", "We find that the store sold {v} {n}.", "The school has {v} {n} on its second floor.",
    "{v} {n} per day", "So, the total amount is {v}.", "12 x 0 + {v} = {v}", "{v} + 0 = {v} {n}",
]  # fmt: skip
STATING_MONEY = [
    "${v}", "${v}.", "\\${v}", "It costs ${v}.", "She spent ${v} in total.", "The answer is ${v}.", "${v} per week",
    "{v} dollars",
    "She has {v} dollars left.", "Answer: ${v}", "He earns ${v} a week.", "The total cost is $\\${v}$.", "USD {v}",
]  # fmt: skip
NOT_STATING = [
    "He sold {u} of the {n}, so {v} are left.", "Either {v} or {u} {n} are left.", "It is not {v} but {u} {n}.",
    "It is not {v}.", "The answer is not {v}.", "{v} or {u}", "{v}, {u}", "{v} and {u}", "between {v} and {u}",
    "{u} - {v}", "{v}-{u} {n}", "{v} to {u} {n}", "at least {v} {n}", "More than {v} {n}.", "about {v} {n}", "not {v}",
    "{u} x {v}", "Maybe {v} {n}.", "{v}?", "Is it {v}?", "There aren't {v} {n}.", "If it is {v}, then it is odd.",
    "{v} is wrong.", "The answer is {u}, not {v}.", "neither {v} nor {u}", "{u} {n} and {v} boxes", "less than {v}",
    "half of {v}", "twice {v} {n}", "{v} times {u}", "{v} squared", "{v} million {n}", "{v}, I guess.", "minus {v}",
    "She had {u} {n} and now has {v}.", "Wait, {v} {n}.", "It could be {v}.", "Anything but {v}", "{v} minus one",
    "I don't think it is {v}.", "{v} dozen", "x > {v}", "x = {v} or x = {u}", "${v}$ or ${u}$", "$x={v}$, $y={u}$",
    "all except {v}", "{u} + {v} = {w}", "{v} = {u}", "{v}\n{u}", "{v}/{u}", "{u}/{v}", "{v}%{n}{u}", "-{v}", "{v}{u}",
    "The answer is {u} {n}.", "There are {u} {n} left.", "{u}", "No, {v}.", "{v} less than {u}", "up to {v} {n}",
    "I cannot tell whether it is {v}.", "Option {u}: {v}", "A) {v} B) {u}", "{v} hundred", "the {v}th", "{v} ± 1",
    "He has {v} {n}, or {u} with the others.", "Suppose there are {v} {n}.", "{v}.{u}", "{v},{u}", "{v}!", "{v}^2",
]  # fmt: skip
NOUNS = "cars apples dollars miles hours students cookies pages pounds minutes".split()


def sentences(golds: list[str], seed: int) -> tuple[list[Case], list[Case]]:
    """Phrases that state one of the golds, which are whole numbers, and phrases that do not."""
    rng = random.Random(seed)
    right, wrong = [], []
    for gold in golds:
        value = int(gold)
        other = value + rng.choice([1, 2, 10, 57]) if rng.random() < 0.6 else 2 * value + 3
        if value < 3 or other == 2 * value:  # 4 - 2 and 2! are 2
            continue
        said = f"{value:,}" if value > 999 and rng.random() < 0.6 else gold
        noun = rng.choice(NOUNS)
        form = rng.choice(STATING)
        right.append((form, gold, form.replace("{v}", said).replace("{n}", noun)))
        if rng.random() < 0.3:
            form = rng.choice(STATING_MONEY)
            right.append((form, gold, form.replace("{v}", said)))
        form = rng.choice(NOT_STATING)
        text = (
            form.replace("{v}", gold).replace("{n}", noun).replace("{u}", str(other)).replace("{w}", str(value + other))
        )
        wrong.append((form, gold, text))
    return right, wrong
