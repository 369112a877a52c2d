"""A preference model as a reward: a sequence-classification model says how good an answer is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rewards.extract import final_part
from rewards.load import RewardError
from rewards.score import Score


@lru_cache(maxsize=2)
def _load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=getattr(torch, dtype), trust_remote_code=False
    ).to(device).eval()
    if loaded.config.num_labels != 1:
        raise RewardError(f"{model} has {loaded.config.num_labels} labels; a preference model has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, loaded


def preference_reward(
    completions: list[str],
    question: str,
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    max_tokens: int = 4_096,
    whole_completion: bool = False,
) -> list[Score]:
    """The score that a preference model (transformers, sequence classification, one label) gives each answer.

    The model reads the question and the final part of the completion (what follows the last `</think>`, arXiv
    2501.12948 section 2.3.4: helpfulness is judged on the summary alone; `whole_completion` for harmlessness), through
    the tokenizer's chat template where it has one. The value is the raw logit, in the model's own scale: normalise by
    the group or give a small weight. A completion without a final part is `unparsed` and gets the lowest value of its
    group. The group is one batch, padded on the right; longer sequences lose their beginning. Raises RewardError for a
    model with more than one label.
    """
    import torch

    tokenizer, loaded = _load(model, device, dtype)
    answers = [text if whole_completion else final_part(text).text for text in completions]
    rows = [_encode(tokenizer, question, answer or "")[-max_tokens:] for answer in answers]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.inference_mode():
        values = loaded(input_ids=tokens, attention_mask=mask).logits[:, 0].float().tolist()
    lowest = min(values)
    return [
        Score(lowest, "unparsed", detail="no final part")
        if answer is None
        else Score(value, "correct" if value > 0 else "wrong")
        for answer, value in zip(answers, values, strict=True)
    ]


def _encode(tokenizer: Any, question: str, answer: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    return list(tokenizer(f"{question}\n\n{answer}")["input_ids"])
