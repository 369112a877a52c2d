"""The Countdown task: instances that can be solved, splits that share nothing."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations_with_replacement, islice, permutations, product

import pytest

from rlzero.examples.countdown.task import LARGEST, moves, reachable, rows, split_of, tasks


def brute_force(numbers: tuple[int, ...]) -> set[Fraction]:
    """Every value of every expression tree over all the numbers, written without looking at the generator."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for order in set(permutations(numbers)):
        for cut in range(1, len(numbers)):
            for a, b in product(brute_force(order[:cut]), brute_force(order[cut:])):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


@pytest.mark.parametrize("split", ["base", "train", "held_out"])
def test_instances_can_be_solved_and_stay_within_their_bounds(split):
    for task in islice(tasks(split, seed=3), 40):
        assert split_of(task.numbers) == split
        assert 10 <= task.target <= 50 and list(task.numbers) == sorted(task.numbers)
        assert max(task.numbers) <= (20 if len(task.numbers) == 3 else 10)
        assert task.target in brute_force(task.numbers)
        assert task.question == f"Make {task.target} from {', '.join(map(str, task.numbers))}."


def test_what_moves_reach_is_what_whole_positive_bounded_steps_reach():
    def slow(numbers: tuple[int, ...]) -> set[int]:
        if len(numbers) == 1:
            return set(numbers)
        found = set()
        for i, j in permutations(range(len(numbers)), 2):
            a, b = numbers[i], numbers[j]
            rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
            quotient = [a // b] if a % b == 0 else []
            for value in (a + b, a - b, a * b, *quotient):
                if 1 <= value <= LARGEST:
                    found |= slow((value, *rest))
        return found

    for numbers in [(1, 1, 1), (3, 7, 14), (20, 20, 20), (2, 5, 7, 9), (4, 4, 8, 10)]:
        assert set(reachable(numbers)) == slow(numbers)


def test_every_move_is_right_and_leaves_the_other_numbers():
    calculate = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": Fraction}
    for numbers in combinations_with_replacement(range(1, 13), 3):
        for move in moves(numbers):
            assert calculate[move.op](move.left, move.right) == move.result
            after = sorted([*move.rest, move.left, move.right])
            assert after == sorted([*numbers, move.result])


def test_a_multiset_of_numbers_belongs_to_one_split_whatever_its_order():
    for numbers in combinations_with_replacement(range(1, 11), 3):
        assert len({split_of(order) for order in permutations(numbers)}) == 1


def test_the_splits_share_no_numbers_and_no_questions():
    made = {split: rows(split, seed=0, count=600) for split in ("base", "train", "held_out")}
    for a, b in (("base", "train"), ("base", "held_out"), ("train", "held_out")):
        numbers = [{tuple(sorted(row["numbers"])) for row in made[s]} for s in (a, b)]
        assert not numbers[0] & numbers[1]
        assert not {r["prompt"] for r in made[a]} & {r["prompt"] for r in made[b]}


def test_rows_are_distinct_and_a_function_of_split_and_seed():
    first = rows("train", seed=1, count=300)
    assert first == rows("train", seed=1, count=300)
    assert first != rows("train", seed=2, count=300)
    assert len({(tuple(r["numbers"]), r["target"]) for r in first}) == 300


def test_more_instances_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="only .* distinct instances of split 'held_out'"):
        rows("held_out", seed=0, count=500, sizes=(3,), largest=(4,))
