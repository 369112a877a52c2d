"""The preference-model reward against transformers called directly, one sequence at a time."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rewards.load import RewardError
from rewards.preference import preference_reward


def save(folder, labels):
    words = {word: i for i, word in enumerate("[PAD] [UNK] [EOS] why because it is so blue the sky".split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=labels,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_a_group_gets_the_logits_of_each_sequence_alone(tmp_path):
    model, tokenizer = save(tmp_path, labels=1)
    answers = ["because it is so", "blue", "the sky is blue because it is so blue"]
    scores = preference_reward([f"<think>why</think>{a}" for a in answers] + ["<think>why"], "why", str(tmp_path))
    alone = [
        model(**tokenizer(f"why\n\n{a}", return_tensors="pt", return_token_type_ids=False)).logits.item()
        for a in answers
    ]
    assert [s.value for s in scores[:3]] == pytest.approx(alone, abs=1e-5)
    assert scores[3].verdict == "unparsed" and scores[3].value <= min(alone) + 1e-6


def test_a_model_with_several_labels_is_refused(tmp_path):
    save(tmp_path, labels=2)
    with pytest.raises(RewardError, match="has 2 labels"):
        preference_reward(["</think>x"], "why", str(tmp_path))
