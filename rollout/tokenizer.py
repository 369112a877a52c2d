"""The tokenizer in a policy's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What transformers 5 writes for a tokenizer that is its tokenizer.json and nothing else.
GENERAL = "TokenizersBackend"


def read_tokenizer(path: str | Path, **options: Any) -> Any:
    """transformers' tokenizer of the folder `path`, with its errors and options. A class that is named there and is the
    general one is taken at once: AutoTokenizer first imports everything it could choose, 3 s in each process."""
    file = Path(path) / "tokenizer_config.json"
    described = json.loads(file.read_text()) if file.is_file() else {}
    if described.get("tokenizer_class") == GENERAL and "auto_map" not in described:
        from transformers import PreTrainedTokenizerFast as kind
    else:
        from transformers import AutoTokenizer as kind
    return kind.from_pretrained(str(path), **options)
