"""Language consistency: how much of the reasoning is written in the language that was asked for."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rewards.extract import reasoning_part
from rewards.score import Score

# Not language: code, formulas, addresses, tags, commands.
_NOT_TEXT = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\boxed\{[^{}]*\}|\\[a-zA-Z]+|https?://\S+|<[^<>\n]{1,40}>|\w*\d\w*"
    r"|\w+\([^()\n]*\)|\w+_\w+",
    re.S,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s*|\n+")

_SCRIPTS: dict[str, tuple[str, ...]] = {
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "uk": ("CYRILLIC",),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
}
# Function words that tell languages of the Latin script apart; words that two of them share are left out.
_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "en": frozenset(
        (
            "the of and to is that it for with this are be we have not from but which so if then there can since "
            "let now each"
        ).split()
    ),
    "de": frozenset(
        (
            "der die das und ist nicht ein eine mit auf für von dem den wir sich auch als wenn dann aber oder "
            "wird sind also"
        ).split()
    ),
    "fr": frozenset(
        (
            "le les et est une dans que qui pour pas avec nous sur au ce cette donc sont il elle mais si alors aux soit"
        ).split()
    ),
    "es": frozenset(
        ("el los y es que una por con para las no se lo su más pero como entonces son este esta si porque hay").split()
    ),
    "it": frozenset(
        (
            "il lo gli e di che è un una per con non sono della del nel quindi ma anche questo questa se allora abbiamo"
        ).split()
    ),
    "pt": frozenset(
        "o os e é que uma por com para não se do da em mais mas como então são este esta isso temos".split()
    ),
    "nl": frozenset("het een en van dat niet met voor zijn we dus maar ook als dan wordt deze dit hebben naar".split()),
    "pl": frozenset("i w jest że nie na się to z do jak więc ale dla mamy tego czyli są".split()),
    "tr": frozenset("ve bir bu için ile da de olarak çok gibi ise değil olan daha sonra".split()),
    "vi": frozenset("là và của có không được cho một các trong với này nên ta vậy".split()),
    "id": frozenset("yang dan di itu dengan untuk tidak dari adalah pada ini kita maka jadi".split()),
}
LANGUAGES = tuple(sorted({*_SCRIPTS, *_FUNCTION_WORDS}))
_CHARACTERS_PER_WORD = {"CJK": 1.6, "HIRAGANA": 2.5, "KATAKANA": 2.5, "THAI": 4.0}


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    name = unicodedata.name(character, "")
    for known in (
        "LATIN",
        "CJK",
        "HIRAGANA",
        "KATAKANA",
        "HANGUL",
        "CYRILLIC",
        "GREEK",
        "ARABIC",
        "HEBREW",
        "DEVANAGARI",
        "THAI",
        "BENGALI",
        "TAMIL",
    ):
        if known in name:
            return known
    return name.partition(" ")[0]


def language_share(text: str, language: str) -> tuple[float, float]:
    """The share of words in `language` (0 to 1) and the number of words, with code and formulas left out.

    A word counts by its script; runs of scripts without spaces count as characters divided by a usual word length.
    Between languages of the Latin script, and between Chinese and Japanese, the sentence decides: by function words, by
    kana. Raises ValueError for an unknown language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; known: {', '.join(LANGUAGES)}")
    mine = total = 0.0
    for sentence in _SENTENCE.split(_NOT_TEXT.sub(" ", text)):
        counts = _words_by_script(sentence)
        total += sum(counts.values())
        if language in _FUNCTION_WORDS:
            mine += counts.get("LATIN", 0.0) * (not _is_other_latin(sentence, language))
        else:
            kana = counts.get("HIRAGANA", 0.0) + counts.get("KATAKANA", 0.0)
            if language == "zh" and kana or language == "ja" and not kana and counts.get("CJK", 0.0) > 6:
                continue
            mine += sum(counts.get(script, 0.0) for script in _SCRIPTS[language])
    return (mine / total if total else 0.0), total


def _words_by_script(sentence: str) -> dict[str, float]:
    counts: dict[str, float] = {}
    for word in _WORD.findall(sentence):
        runs: dict[str, int] = {}
        for character in word:
            if character.isalpha():
                runs[_script(character)] = runs.get(_script(character), 0) + 1
        if len(word) == 1 and "LATIN" in runs:
            continue  # a variable
        for script, characters in runs.items():
            if script == "GREEK" and characters <= 2 and len(runs) == 1:
                continue  # a symbol
            per_word = _CHARACTERS_PER_WORD.get(script)
            counts[script] = counts.get(script, 0.0) + (characters / per_word if per_word else 1.0 / len(runs))
    return counts


def _is_other_latin(sentence: str, language: str) -> bool:
    words = [word.lower() for word in _WORD.findall(sentence)]
    hits = {name: sum(word in known for word in words) for name, known in _FUNCTION_WORDS.items()}
    best = max(hits, key=lambda name: hits[name])
    return best != language and hits[best] >= 2 and hits[best] > hits[language]


def language_reward(completion: str, language: str = "en", threshold: float = 0.9) -> Score:
    """The share of words in the reasoning that belong to `language`, from 0 to 1.

    R1's language-consistency reward (arXiv 2501.12948): "the proportion of target language words in the CoT". The
    reasoning is what stands in front of the last `</think>`, the whole completion where there is no such tag. Verdict
    `correct` from `threshold` on; `unparsed` (value 0) without any word.
    """
    share, words = language_share(reasoning_part(completion), language)
    if not words:
        return Score(0.0, "unparsed", {"language_words": 0.0}, "no words")
    return Score(
        share, "correct" if share >= threshold else "wrong", {"language_words": words, "language_share": share}
    )
