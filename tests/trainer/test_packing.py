"""Packing: every sample once, nothing padded, never over the budget, the same list always the same batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.packing import Sample, pack, partition, to_device


def sample(prompt=3, completion=4, **fields):
    fields.setdefault("advantage", 1.0)
    return Sample(list(range(prompt)), list(range(100, 100 + completion)), **fields)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_partition_places_each_length_once_within_the_budget_and_near_the_optimum(lengths, budget):
    groups = partition(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= budget for group in groups)
    lower_bound = -(-sum(lengths) // budget)
    # two groups always hold more than one budget together, else the second would not have been opened
    assert len(groups) <= max(2 * lower_bound, 1) if lengths else groups == []


def test_best_fit_decreasing_fills_what_a_fixed_order_wastes():
    assert len(partition([5, 5, 5, 7, 3, 5], 10)) == 3  # exactly full: no token of the budget is wasted


def test_a_batch_holds_the_samples_tokens_positions_and_streams_unpadded():
    first = sample(2, 3, advantage=[0.1, 0.2, 0.3], behaviour_logprobs=[-1.0, -2.0, -3.0], versions=[(4, 1), (5, 2)])
    second = sample(3, 1, advantage=-1.5, behaviour_logprobs=[-4.0], versions=[(5, 1)])
    (batch,) = pack([second, first], 16, temperature=0.7)
    assert batch.sequence_ids.tolist() == [1, 0]  # longest first
    assert batch.tokens.tolist() == [0, 1, 100, 101, 102, 0, 1, 2, 100]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.bounds.tolist() == [0, 5, 9]
    assert batch.loss_mask.tolist() == [False, False, True, True, True, False, False, False, True]
    assert torch.equal(batch.advantages, torch.tensor([0, 0, 0.1, 0.2, 0.3, 0, 0, 0, -1.5]))
    assert batch.behaviour_logprobs.tolist() == [0, 0, -1, -2, -3, 0, 0, 0, -4]
    assert batch.versions.tolist() == [-1, -1, 4, 5, 5, -1, -1, -1, 5]
    assert (batch.total_tokens, batch.total_sequences, batch.temperature) == (4, 2, 0.7)


def test_denominators_are_those_of_the_whole_list_not_of_the_micro_batch():
    batches = pack([sample(3, 4) for _ in range(5)], 14)
    assert len(batches) == 3
    assert {(b.total_tokens, b.total_sequences) for b in batches} == {(20, 5)}


def test_masked_samples_cost_nothing_and_count_nothing():
    batches = pack([sample(), sample(masked=True), sample()], 100)
    assert batches[0].sequence_ids.tolist() == [0, 2] and len(batches[0].tokens) == 14
    assert (batches[0].total_tokens, batches[0].total_sequences) == (8, 2)
    assert pack([sample(masked=True)], 100) == [] and pack([], 100) == []


def test_loss_on_prompt_trains_every_token_but_the_first():
    (batch,) = pack([sample(3, 2, loss_on_prompt=True), sample(0, 2, loss_on_prompt=True)], 100)
    assert batch.loss_mask.tolist() == [False, True, True, True, True, False, True]
    assert batch.total_tokens == 5
    (batch,) = pack([Sample([], [7, 8, 9])], 100)  # a completion without a prompt: its first token is not predicted
    assert batch.loss_mask.tolist() == [False, True, True]


def test_learned_picks_tokens_of_the_completion():
    turns = sample(2, 5, learned=[True, False, False, True, True])
    (batch,) = pack([turns, sample(1, 1), sample(3, 3, learned=[False] * 3)], 100)
    assert batch.sequence_ids.tolist() == [0, 1]  # nothing to learn: left out
    assert batch.loss_mask.tolist() == [False, False, True, False, False, True, True, False, True]
    assert (batch.total_tokens, batch.total_sequences) == (4, 2)
    (batch,) = pack([Sample([], [7, 8, 9], learned=[True, False, True])], 100)  # the first has nothing before it
    assert batch.loss_mask.tolist() == [False, False, True]


def test_routed_experts_keep_their_rows_and_the_router_chooses_for_the_rest():
    experts = np.arange(7 * 2 * 3).reshape(7, 2, 3).astype(np.int16)
    (batch,) = pack([sample(2, 1), sample(3, 4, routed_experts=experts)], 100)
    assert np.array_equal(batch.routed_experts[:7].numpy(), experts)
    assert (batch.routed_experts[7:] == -1).all() and len(batch.routed_experts) == 10


def test_equal_lists_pack_equally():
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    make = lambda: pack([sample(2, int(n)) for n in lengths], 64)  # noqa: E731
    assert [b.sequence_ids.tolist() for b in make()] == [b.sequence_ids.tolist() for b in make()]


def test_all_samples_that_cannot_be_packed_are_named_at_once():
    bad = [sample(20, 20), sample(), sample(behaviour_logprobs=[0.0])]
    bad += [sample(routed_experts=np.zeros((7, 2, 3))), sample(routed_experts=np.zeros((7, 1, 3)))]
    bad += [sample(versions=[(0, 3)]), sample(advantage=[1.0]), sample(learned=[True])]
    with pytest.raises(ValueError) as error:
        pack(bad, 32)
    message = str(error.value)
    assert "sample 0 has 40 tokens (20 prompt + 20 completion), more than the 32" in message
    assert "sample 2: behaviour_logprobs has 1 values for 4" in message
    assert "sample 4: routed_experts has layers and experts [1, 3], others [2, 3]" in message
    assert "sample 5: versions count 3" in message and "sample 6: advantage has 1" in message
    assert "sample 7: learned has 1 values for 4" in message
    assert "sample 1" not in message


def test_a_stream_that_only_some_samples_carry_is_refused():
    with pytest.raises(ValueError, match="1 of 2 samples carry behaviour_logprobs"):
        pack([sample(), sample(behaviour_logprobs=[0.0] * 4)], 32)


def test_to_device_leaves_a_batch_alone_that_is_there():
    (batch,) = pack([sample()], 32)
    assert to_device(batch, torch.device("cpu")) is batch
    meta = to_device(batch, torch.device("meta"))
    assert meta.tokens.device.type == "meta" and meta.bounds.device.type == "cpu"
