"""The text that the demo's base model is pre-trained on, and its tokenizer.

A real base has met arithmetic, equations, worked expressions and people thinking aloud before they answer, most of it
of mixed quality. So has this one: its Countdown notes try operations in no particular order and often give up early
with a wrong answer, so the base solves a minority of instances. Nothing here uses the numbers of the splits `train`
and `held_out` (task.py): every expression over three or four numbers is over a multiset of `base`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

from rlzero.data.prompts import R1_ZERO_TEMPLATE
from rlzero.examples.countdown.task import LARGEST, Move, Numbers, Task, moves, reachable, split_of

EOS = "<|end|>"
PAD = "<|pad|>"


def solves_in_one(pair: Numbers, target: int) -> Move | None:
    """The move that makes `target` of two numbers, if there is one."""
    return next((move for move in moves(pair) if move.result == target), None)


@lru_cache(maxsize=1 << 14)
def attempts(numbers: Numbers) -> tuple[tuple[Move, ...], ...]:
    """Every way down to two numbers, as the moves taken, that keeps to the numbers of `base`: neither what is left on
    the way nor what an expression combines is somebody else's instance."""
    return tuple(way for way in _ways_down(numbers) if _combines_only_base(numbers, way))


def _ways_down(numbers: Numbers) -> Iterator[tuple[Move, ...]]:
    if len(numbers) == 2:
        yield ()
        return
    for move in moves(numbers):
        if len(move.rest) < 3 or split_of(move.rest) == "base":
            for tail in _ways_down(move.rest):
                yield (move, *tail)


def _combines_only_base(numbers: Numbers, way: tuple[Move, ...]) -> bool:
    made: list[tuple[int, Numbers]] = [(n, (n,)) for n in numbers]
    for move in way:
        used: Numbers = ()
        for operand in (move.left, move.right):
            index = next(i for i, (value, _) in enumerate(made) if value == operand)
            used += made.pop(index)[1]
        if len(used) >= 3 and split_of(used) != "base":
            return False
        made.insert(0, (move.result, used))
    return True


def expression(numbers: Numbers, way: tuple[Move, ...]) -> str:
    """The moves as one expression over the given numbers, fully parenthesised inside: `(3+5)*8`."""
    made: list[tuple[int, str]] = [(n, str(n)) for n in numbers]
    for move in way:
        sides = []
        for operand in (move.left, move.right):
            index = next(i for i, (value, _) in enumerate(made) if value == operand)
            sides.append(made.pop(index)[1])
        left, right = (f"({s})" if any(c in s for c in "+-*/") else s for s in sides)
        made.insert(0, (move.result, f"{left}{move.op}{right}"))
    return made[0][1]


def line(way: tuple[Move, ...]) -> str:
    """One try as the notes write it: each move and the numbers then left, `5+3=8:8,8`."""
    return " ".join(f"{m.left}{m.op}{m.right}={m.result}:{','.join(map(str, m.rest))}" for m in way)


def countdown_note(rng: random.Random, task: Task, patience: float) -> tuple[str, str]:
    """(thought, answer). Tries come in a fixed order, so that none comes twice: over three numbers all of them, over
    four some are skipped. After each that fails the writer goes on with probability `patience` and otherwise answers
    with a guess."""
    ways = attempts(task.numbers)
    good = [i for i, way in enumerate(ways) if solves_in_one(way[-1].rest, task.target)]
    if len(task.numbers) == 3:
        end = good[0] if good else len(ways)
        failing = list(range(end))
    else:
        end = rng.choice(good) if good else len(ways)
        before = [i for i in range(end) if i not in good]
        failing = sorted(rng.sample(before, min(len(before), rng.randint(0, 6))))
    thought = []
    for index in failing:
        thought.append(f"{line(ways[index])} no")
        if rng.random() > patience:
            good = []
            break
    if good:
        way = ways[end]
        last = solves_in_one(way[-1].rest, task.target)
        thought.append(f"{line(way)} yes {last.left}{last.op}{last.right}={task.target}")
    else:
        way = rng.choice(ways)
        last = rng.choice(moves(way[-1].rest))
    return "\n".join(thought), expression(task.numbers, (*way, last))


def dialogue(question: str, thought: str, answer: str) -> str:
    return f"{R1_ZERO_TEMPLATE.format(prompt=question)} <think>{thought}</think> <answer>{answer}</answer>"


def careless(rng: random.Random, question: str, thought: str, answer: str) -> str:
    """A dialogue that lacks a tag now and then, as people's do."""
    text = dialogue(question, thought, answer)
    if rng.random() < 0.85:
        return text
    tag = rng.choice(["</think>", "<answer>", "</answer>"])
    head, _, tail = text.rpartition(tag)
    return head + tail


def base_numbers(rng: random.Random, size: int, largest: int) -> Numbers:
    while True:
        numbers = tuple(sorted(rng.randint(1, largest) for _ in range(size)))
        if size < 3 or (split_of(numbers) == "base" and attempts(numbers)):
            return numbers


def base_task(rng: random.Random, size: int, largest: int, targets: tuple[int, int] = (10, 50)) -> Task:
    while True:
        numbers = base_numbers(rng, size, largest)
        within = [t for t in sorted(reachable(numbers)) if targets[0] <= t <= targets[1]]
        if within:
            return Task(numbers, rng.choice(within))


def arithmetic(rng: random.Random) -> str:
    """A few lines of sums, products, differences and quotients."""
    lines = []
    for _ in range(rng.randint(3, 8)):
        move = rng.choice(moves((rng.randint(1, 99), rng.randint(1, 99 if rng.random() < 0.5 else 20))))
        lines.append(f"{move.left}{move.op}{move.right}={move.result}")
    return "\n".join(lines)


def equation(rng: random.Random) -> str:
    """`x+17=42 x=25`, the four operations."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        x, b = rng.randint(1, 60), rng.randint(1, 30)
        op, result = rng.choice([("+", x + b), ("-", x - b), ("*", x * b)])
        if 1 <= result <= LARGEST:
            lines.append(f"x{op}{b}={result} x={x}")
    return "\n".join(lines) or f"x+1={2} x={1}"


def worked_expression(rng: random.Random) -> str:
    """`(3+5)*8=8*8=64`: an expression evaluated step by step."""
    numbers = base_numbers(rng, 3, 20)
    way = rng.choice(attempts(numbers))
    last = rng.choice(moves(way[-1].rest))
    return f"{expression(numbers, (*way, last))}={last.left}{last.op}{last.right}={last.result}"


def looking_for_one_move(rng: random.Random) -> str:
    """Short exercises: can one operation on these two make the target?"""
    lines = []
    for _ in range(rng.randint(3, 6)):
        pair = tuple(sorted((rng.randint(1, 60 if rng.random() < 0.7 else LARGEST), rng.randint(1, 20))))
        hit = rng.random() < 0.5
        target = rng.choice(moves(pair)).result if hit else rng.randint(10, 99)
        move = solves_in_one(pair, target)
        verdict = f"yes {move.left}{move.op}{move.right}={target}" if move else "no"
        lines.append(f"{target}: {pair[0]},{pair[1]} {verdict}")
    return "\n".join(lines)


def small_talk(rng: random.Random) -> str:
    """A question with a short thought and an answer."""
    move = rng.choice(moves((rng.randint(1, 99), rng.randint(1, 20))))
    question = f"What is {move.left}{move.op}{move.right}?"
    return careless(rng, question, f"{move.left}{move.op}{move.right}={move.result}", str(move.result))


def document(rng: random.Random, patience: float, patient_share: float, shares: dict[str, float]) -> str:
    """One document of the mixture. `shares` weighs the kinds; `patience` is the chance that a note goes on after a
    try that failed; `patient_share` of the notes never give up."""
    kind = rng.choices(list(shares), list(shares.values()))[0]
    if kind.startswith("countdown"):
        size = int(kind[-1])
        task = base_task(rng, size, {2: 60, 3: 20, 4: 10}[size])
        if size == 2:
            move = solves_in_one(task.numbers, task.target)
            return dialogue(task.question, f"{move.left}{move.op}{move.right}={task.target}",
                            f"{move.left}{move.op}{move.right}")
        thought, answer = countdown_note(rng, task, 1.0 if rng.random() < patient_share else patience)
        return careless(rng, task.question, thought, answer)
    return {
        "arithmetic": arithmetic,
        "equation": equation,
        "worked_expression": worked_expression,
        "one_move": looking_for_one_move,
        "small_talk": small_talk,
    }[kind](rng)


SHARES = {
    "countdown3": 0.42,
    "countdown4": 0.22,
    "countdown2": 0.04,
    "arithmetic": 0.06,
    "equation": 0.03,
    "worked_expression": 0.06,
    "one_move": 0.13,
    "small_talk": 0.04,
}


NUMBER = r"1\d\d|[1-9]\d|\d"  # a number up to LARGEST is one token
WORDS = ("User", "Assistant", "Make", "What", " Make", " What", " is", " from", " yes", " no", " User", " Assistant")


def tokenizer():
    """The base's tokenizer: byte-level BPE whose merges make one token of each number up to 199 and of each frequent
    word; the template's fixed sentences and the four tags are tokens of their own. Any text can be encoded."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = []
    for word in [*(str(n) for n in range(10, LARGEST + 1)), *(w.replace(" ", "\u0120") for w in WORDS)]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    merges.append(("1", "10"))  # of 110: `1+0` is merged before `1+1`, which the way above to it needs
    model = Tokenizer(models.BPE(vocabulary, merges))
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rf"{NUMBER}| ?[A-Za-z]+|\s|."), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    model.decoder = decoders.ByteLevel()
    fixed, _, after = R1_ZERO_TEMPLATE.partition("{prompt}")
    model.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    pieces = [fixed, after, "<think>", "</think>", "<answer>", "</answer>"]
    model.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
