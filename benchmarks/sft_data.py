"""How long `rlzero sft` takes to prepare its rows: cold, in one process and in all, and when it starts again.

    python benchmarks/sft_data.py [--rows 200000]

Rows are conversations of one question and one answer, about 1 KB each; the tokenizer is a byte-level BPE of 8,000
tokens made of them; the template is ChatML. Seconds are wall time; CPU seconds count all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from rlzero.config.sft import SftConfig
from rlzero.data import prepare
from rlzero.stages import sft

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def row(rng: random.Random, words: list[str]) -> dict:
    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count)) + "."

    asked = {"role": "user", "content": text(30)}
    return {"messages": [asked, {"role": "assistant", "content": f"<think>{text(90)}</think> {text(20)}"}]}


def make(folder: Path, count: int) -> SftConfig:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 10))) for _ in range(20_000)]
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for _ in range(count):
            file.write(json.dumps(row(rng, words)) + "\n")
    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(500)]
    bpe.train_from_iterator(texts, vocab_size=8000, show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    made.save_pretrained(folder / "base")
    return SftConfig(policy={"path": str(folder / "base")}, data={"train": str(rows)}, rows_per_step=128)


def timed(name: str, config: SftConfig) -> None:
    before, began = os.times(), time.monotonic()
    prepared = sft.prepare(config)
    fingerprint = prepared.train.fingerprint  # a resumed run compares it
    after = os.times()
    cpu = sum(after[i] - before[i] for i in range(4))
    print(f"{name:<24} {time.monotonic() - began:7.1f} s wall  {cpu:7.1f} s CPU  {prepared.train.tokens:,} tokens"
          f"  {fingerprint}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        config = make(Path(folder), count)
        size = Path(config.data.train).stat().st_size
        print(f"{count:,} rows, {size / 1e6:.0f} MB, {len(os.sched_getaffinity(0))} cores", flush=True)
        small, prepare.SMALL = prepare.SMALL, count
        timed("cold, one process", config)
        prepare.SMALL = small
        timed("cold, all cores", config)
        timed("again (a resumed run)", config)


if __name__ == "__main__":
    main()
