"""The tokenizer in a policy's folder, and the text of what was sampled."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.model_folder import model_fields, read_json, text_fields

_BREAK = "\uf8ff"  # of Unicode's private use; stands inside a special token's text where a row quotes it
_OTHER_MEDIA = re.compile(r"image|audio|video|vision|sound", re.IGNORECASE)
log = logging.getLogger(__name__)

# What transformers 5 writes for a tokenizer that is its tokenizer.json and nothing else.
GENERAL = "TokenizersBackend"
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_tokenizer(path: str | Path, **options: Any) -> Any:
    """transformers' tokenizer of the folder `path`, with its errors and options; code that the folder brings is never
    run. A class that is named there and is the general one is taken at once: AutoTokenizer first imports everything it
    could choose, 3 s in each process."""
    described = read_json(Path(path) / "tokenizer_config.json")
    if described.get("tokenizer_class") == GENERAL and "auto_map" not in described:
        from transformers import PreTrainedTokenizerFast as kind
    else:
        from transformers import AutoTokenizer as kind
    return kind.from_pretrained(str(path), trust_remote_code=False, **options)


def folder_tokenizer(path: str | Path) -> Any:
    """`read_tokenizer` for an engine; None, with a warning, where the folder has none."""
    if any((Path(path) / name).exists() for name in FILES):
        return read_tokenizer(path, local_files_only=True)
    log.warning("%s has no tokenizer: rollouts will carry no text, stop strings are refused", path)
    return None


def tokens_past_vocabulary(path: str | Path, tokenizer: Any) -> str:
    """The tokens whose ids are past the vocabulary of the model in `path`, in words; "" where there are none. Tokens
    for images and sound do not count: a text model that came of a larger one keeps them (Gemma 3), and text never
    holds them."""
    known = text_fields(model_fields(path)).get("vocab_size")
    if not isinstance(known, int) or len(tokenizer) <= known:
        return ""
    past = {i: token for token, i in tokenizer.get_vocab().items() if i >= known and not _OTHER_MEDIA.search(token)}
    shown = ", ".join(f"{past[i]!r} is {i}" for i in sorted(past)[:5]) + (", ..." if len(past) > 5 else "")
    return f"{shown} (vocab_size is {known})" if past else ""


def quoted(text: str, tokenizer: Any) -> str:
    """`text` of a row, marked so that `encode_quoted` never makes a special token of what it holds: a question that
    speaks of <|im_end|> must not end a turn."""
    special = sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}, key=len, reverse=True)
    if not special:
        return text
    return re.sub("|".join(map(re.escape, special)), lambda found: found[0][:1] + _BREAK + found[0][1:], text)


def unquoted(text: str) -> str:
    """The text that `quoted` marked, as it was."""
    return text.replace(_BREAK, "")


def encode_quoted(tokenizer: Any, text: str, special: bool) -> list[int]:
    """The tokens of `text`, of which parts may be `quoted`; with `special` the tokenizer adds its own (BOS)."""
    first, *rest = text.split(_BREAK)
    tokens = list(tokenizer(first, add_special_tokens=special)["input_ids"])
    for part in rest:
        tokens += tokenizer(part, add_special_tokens=False)["input_ids"]
    return tokens


def completion_text(tokenizer: Any, tokens: Sequence[int], ends: Collection[int]) -> str:
    """The text that rewards and stop strings see: `tokens` as they are, special ones too, without a last one that is in
    `ends`; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    kept = tokens[:-1] if len(tokens) and tokens[-1] in ends else tokens
    return tokenizer.decode(kept, skip_special_tokens=False)
