"""Units, currencies, percent signs and counted nouns: what stands behind (or, for money, in front of) a value."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_UNITS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "g": "g gram",
    "kg": "kg kilogram",
    "mg": "mg milligram",
    "t": "ton tonne",
    "lb": "lb pound",
    "oz": "oz ounce",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "gal": "gallon gal",
    "acre": "acre",
    "ha": "ha hectare",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "Hz": "hz hertz",
    "deg": "degree deg °",
    "rad": "radian rad",
    "celsius": "celsius °c",
    "fahrenheit": "fahrenheit °f",
    "$": "$ dollar buck usd",
    "¢": "¢ cent",
    "€": "€ euro eur",
    "£": "£ gbp",
    "¥": "¥ yen yuan",
    "₹": "₹ rupee inr",
    "unit": "unit",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_COMPOUND = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmh": ("km", "h")}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}
_NOUNS = frozenset("people men women children way point each total person student apple more".split())
_FILLERS = frozenset("the of a an in total different distinct possible such".split())
# Words that do something to a number, or to the whole answer, instead of counting.
_NO_NOUNS = frozenset(
    "hundreds thousands millions billions dozens halves thirds fourths quarters fifths sixths sevenths eighths"
    " ninths tenths twelfths times minus plus less is was his this thus has does yes guess wrongs unless perhaps always"
    " sometimes plusminus percents scores pairs cos sins logs decimals digits places squares cubes powers mods bases"
    " roots tenth not no and or nor but if mod base factorial isn than least most except about half".split()
)
_PIECE = (
    r"(?:\\text\{[^{}]*\}|(?<![\\a-zA-Z])[a-zA-Z]{2,}\.?|(?<=/)[a-zA-Z](?![a-zA-Z])|(?<=\d)[mgJN](?=/[a-z])"
    r"|(?<= )a(?= [a-z])|(?:\\\$|[$€£¥¢₹°])[CF]?)(?:\^\{-?\d\})?"
)
_TAIL = re.compile(rf"^(?P<value>.*?)\s*(?P<tail>{_PIECE}(?:(?: |/|\\cdot |\*)?{_PIECE})*)$", re.S)
_MONEY = re.compile(r"^([-+]?)\s*(?:US)?(?:\\text\{)?(\\\$|[€£¥₹]|USD|EUR|GBP)\}?\s*(.+)$", re.S)
_WORD = re.compile(r"[^\W\d_]+|[$€£¥¢₹]|°[CF]?|/|\^ ?\{-?\d\}|\S")


@dataclass(frozen=True)
class Unit:
    """Physical units and currencies with their powers, sorted, and the nouns that are counted; `countable` says that
    these look like things that one counts: plural words, or words such as "people"."""

    atoms: tuple[tuple[str, int], ...] = ()
    nouns: frozenset[str] = frozenset()
    countable: bool = field(default=True, compare=False)

    def __bool__(self) -> bool:
        return bool(self.atoms or self.nouns)


@dataclass(frozen=True)
class Measured:
    """A value's canonical text and what was written around it. `scale` is that of words such as "million"."""

    text: str
    unit: Unit = Unit()
    percent: bool = False
    scale: int = 1


@lru_cache(maxsize=8192)
def measured(text: str) -> Measured:
    """Takes a unit, a currency sign or counted nouns off a canonical text.

    Only words that can follow a number come off; where another word stands ("not", "or", "times"), nothing does.
    """
    if len(text) > 400:  # no unit is looked for where looking takes long
        return Measured(text)
    money = _MONEY.match(text)
    atoms: list[tuple[str, int]] = []
    if money:
        text, atoms = money[1] + money[3], [(_UNIT_OF[money[2].lstrip("\\").lower()], 1)]
    unit, scale = Unit(tuple(atoms)), 1
    tail = _TAIL.match(text) if text[-1:] in "}.$€£¥¢₹°" or text[-1:].isalpha() else None
    if tail and tail["value"] and tail["value"][-1] not in "-+*/^_=<>([{,":
        found = parse_unit(tail["tail"])
        if found is not None and not ("°" in tail["tail"] and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)):
            scale, behind = found
            unit = Unit(tuple(sorted({*atoms, *behind.atoms})), behind.nouns, behind.countable)
            text = tail["value"].strip()
    if text.endswith("%"):
        return Measured(text[:-1].strip(), unit, True, scale)
    return Measured(text, unit, False, scale)


@lru_cache(maxsize=2048)
def parse_unit(tail: str) -> tuple[int, Unit] | None:
    """The scale and unit that words behind a number say (`million dollars`, `km/h`, `sq. units`); None when one of the
    words cannot follow a number."""
    tail = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", tail).replace(".", " ").replace("\\$", "$").replace("-", " ")
    pieces = _WORD.findall(tail)
    scale, sign, power = 1, 1, 1
    atoms: dict[str, int] = {}
    nouns: set[str] = set()
    countable = True
    for at, piece in enumerate(pieces):
        word = piece.lower()
        if at == 0 and word in SCALES:
            scale = SCALES[word]
        elif word in ("/", "per") or (word in ("a", "an") and (atoms or nouns or at == 0)):
            sign = -1
        elif word in ("squared", "cubed") or piece.startswith("^"):
            if not atoms:
                return None
            last = list(atoms)[-1]
            atoms[last] *= _POWERS[word] if word in _POWERS else int(piece.strip("^ {}"))
        elif word in _POWERS:
            power = _POWERS[word]
        elif word in _COMPOUND:
            for name, by in zip(_COMPOUND[word], (1, -1), strict=True):
                atoms[name] = by
        elif (name := _UNIT_OF.get(word) or _UNIT_OF.get(word.removesuffix("s"))) is not None:
            if name in ("celsius", "fahrenheit"):
                atoms.pop("deg", None)
            atoms[name] = atoms.get(name, 0) + sign * power
            sign, power = 1, 1
        elif word in _NO_NOUNS or not word.isalpha() or (sign < 0 and len(word) < 3):
            return None
        elif word not in _FILLERS:
            nouns.add(("per " if sign < 0 else "") + word.removesuffix("s"))
            countable &= sign < 0 or word in _NOUNS or (len(word) > 3 and word.endswith("s"))
            sign = 1
    return scale, Unit(tuple(sorted(atoms.items())), frozenset(nouns), countable and len(nouns) <= 3)


def compatible(gold: Unit, unit: Unit) -> bool:
    """Whether a value in `unit` may stand for one in `gold`. A unit that is left out fits; nothing is converted."""
    if not unit or not gold:
        return bool(gold) or unit.countable
    if unit.atoms != gold.atoms:
        return False
    return unit.nouns <= gold.nouns or (gold.nouns <= unit.nouns and unit.countable)
