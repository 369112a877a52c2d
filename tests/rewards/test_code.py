"""code_reward: which code is the answer, which tests it faces, and what the verdict means."""

import json
import math
import select
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import code
from rewards.code import AssertTests, CallTests, ProgramTests, code_reward, extract_code, parse_tests
from rewards.load import load_reward
from rewards.score import Score
from rewards.workers.runner import RewardRunner

DATA = Path(__file__).parents[3] / "shared" / "data"


def block(text: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{text}\n```\n"


def rows(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path.name}: it lies in ../shared/data where the data sets are")
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, expected",
    [
        (block("a = 1"), "a = 1\n"),
        (block("a = 1", ""), "a = 1\n"),
        (block("a = 1", "py"), "a = 1\n"),
        (block("a = 1") + block("b = 2"), "b = 2\n"),
        (block("a = 1") + block("5 6", "text"), "a = 1\n"),
        (block("a", "cpp"), None),
        ("print(1)", None),
        ("", None),
        ("```python\nprint(1)", None),
        (block("a = 1") + "```python\nb =", None),
        ("<think>" + block("a = 1") + "</think>\n" + block("b = 2"), "b = 2\n"),
        ("<think>" + block("a = 1") + "</think> done", None),
        ("<think>" + block("a = 1"), None),
        (block("a = 1") + "<|im_end|>" + block("b = 2"), "a = 1\n"),
        (block("a = 1") + "<｜end▁of▁sentence｜>" + block("b"), "a = 1\n"),
        ("</think><answer>" + block("a = 1") + "</answer>", "a = 1\n"),
        ("<answer>" + block("a = 1"), None),
        ("<answer>" + block("a") + "</answer><answer>" + block("b") + "</answer>", None),
        (block("b = 2") + "<answer>x</answer>", None),
        (block("a = 1") + "\nUser: another one\n" + block("b = 2"), "a = 1\n"),
        ("Problem: add\n" + block("a = 1"), "a = 1\n"),
        (block("user: str = 'x'\n# Question: why"), "user: str = 'x'\n# Question: why\n"),
        ("~~~python\na = 1\n~~~", "a = 1\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("```python\r\na = 1\r\n```\r\n", "a = 1\r\n"),
        ("`a = 1`", None),
        (block("a = 'x\x0cy'"), "a = 'x\x0cy'\n"),
        ("text ```python\na = 1\n```", None),
    ],
)
def test_the_answer_is_the_last_closed_block_of_the_final_part(completion, expected):
    assert extract_code(completion) == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [
                "```",
                "```python\n",
                "~~~",
                "\n",
                "<think>",
                "</think>",
                "<answer>",
                "</answer>",
                "x",
                "</s>",
                "`",
                "User:",
            ]
        )
    )
)
def test_extraction_never_fails_and_gives_whole_lines_of_the_text(parts):
    text = "".join(parts)
    found = extract_code(text)
    assert found is None or (found.endswith("\n") and found.rstrip("\n") in text)


# -- tests of a row --------------------------------------------------------------------------------------------------


def test_every_form_of_tests_is_read():
    stdio = {"inputs": ["1"], "outputs": ["2"]}
    assert parse_tests(stdio) == parse_tests(json.dumps(stdio)) == ProgramTests(["1"], ["2"])
    called = CallTests("f", [((1, 2), {}), ((), {"a": 1})], [3, 4], lists=True)
    assert parse_tests({"fn_name": "f", "inputs": [[1, 2], {"a": 1}], "outputs": [3, 4]}) == called
    assert parse_tests(["assert f(1)"], prepare="x = 1") == AssertTests(["assert f(1)"], prepare="x = 1")
    assert parse_tests({"stdout": "hello"}) == ProgramTests([""], ["hello"])
    check = parse_tests("def check(candidate):\n    assert candidate(1)", "f", "import re")
    assert check.entries == ("f",) and check.tests[0].endswith("check(f)\n") and check.setup == "import re"


@pytest.mark.parametrize(
    "tests",
    [
        {},
        [],
        [1],
        5,
        {"inputs": []},
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [1], "outputs": [2]},
    ],
)
def test_tests_that_make_no_sense_are_named(tests):
    with pytest.raises(ValueError, match="expected"):
        parse_tests(tests)


def test_check_without_an_entry_point_is_named():
    with pytest.raises(ValueError, match="entry_point"):
        parse_tests("def check(candidate): pass")


# -- the reward ------------------------------------------------------------------------------------------------------

ADD = {"fn_name": "add", "inputs": [[1, 2], [2, 2], [5, 5]], "outputs": [3, 4, 10]}


def test_verdicts_and_values():
    right = code_reward(block("def add(a, b): return a + b"), ADD)
    assert (right.value, right.verdict, right.metrics["passed_share"]) == (1.0, "correct", 1.0)
    wrong = code_reward(block("def add(a, b): return 4"), ADD)
    assert (wrong.value, wrong.verdict, wrong.metrics["tests_run"]) == (0.0, "wrong", 1.0) and "test 0" in wrong.detail
    shared = code_reward(block("def add(a, b): return 4"), ADD, credit="share")
    assert (shared.value, shared.verdict) == (pytest.approx(1 / 3), "wrong")
    assert code_reward("no code", ADD).verdict == "unparsed"
    slow = code_reward(block("def add(a, b):\n    while 1: pass"), ADD, timeout_s=0.3)
    assert (slow.value, slow.verdict) == (0.0, "timeout")


def test_json_has_no_tuples_so_a_tuple_answers_a_list():
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [[1, 1]]}
    assert code_reward(block("def f(x): return x, x"), tests).verdict == "correct"
    assert code_reward(block("def f(x): return {x: x}.values()"), tests).verdict == "wrong"


def test_floats_need_the_tolerance_that_the_task_gives():
    tests = {"fn_name": "f", "inputs": [[0.1, 0.2]], "outputs": [0.3]}
    answer = block("def f(x, y): return x + y")
    assert code_reward(answer, tests).verdict == "wrong"
    assert code_reward(answer, tests, float_tolerance=1e-9).verdict == "correct"


def test_a_completion_without_fences_is_code_only_when_asked():
    assert code_reward("def add(a, b): return a + b", ADD).verdict == "unparsed"
    assert code_reward("def add(a, b): return a + b", ADD, fence=False).verdict == "correct"


def test_options_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="supported: 'python'"):
        code_reward("x", ADD, language="cobol")
    with pytest.raises(ValueError, match="supported: 'python'"):
        code_reward("x", ADD, language="cobol", fence=False)
    with pytest.raises(ValueError, match="'all' or 'share'"):
        code_reward("x", ADD, credit="half")


def test_trouble_of_ours_is_an_error_and_never_a_number(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    score = code_reward(block("def add(a, b): return a + b"), ADD, isolation="bubblewrap")
    assert score.verdict == "error" and math.isnan(score.value) and "bwrap" in score.detail


def test_tests_that_only_the_candidate_could_judge_are_an_error():
    answer = block("class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return o.x == self.x")
    score = code_reward(answer, ["assert P(1).x == 1", "assert P(1) == P(1)"])
    assert score.verdict == "error" and math.isnan(score.value) and "own __eq__ would decide" in score.detail
    helper = ["assert same(f(1), 2)"]
    assert "entry_point" in code_reward(block("def f(x): return x"), helper).detail
    assert code_reward(block("def f(x): return 2\ndef same(a, b): return a == b"), helper, "f, same").value == 1.0


def test_a_sandbox_that_died_is_replaced():
    good = block("def add(a, b): return a + b")
    assert code_reward(good, ADD).verdict == "correct"
    for sandbox in code._sandboxes.values():
        sandbox._process.kill()
        hung_up = select.poll()  # the forking process dies a moment after its parent, and could still do a job
        hung_up.register(sandbox._control.line, select.POLLHUP)
        assert hung_up.poll(10_000)
    assert code_reward(good, ADD).verdict == "error"
    assert code_reward(good, ADD).verdict == "correct"


def test_it_is_a_reward_like_any_other():
    reward = load_reward("rewards.code:code_reward", {"credit": "share"})
    score = reward.one(block("def add(a, b): return a + b"), {"tests": ADD, "answer": "unused", "id": 3})
    assert isinstance(score, Score) and score.value == 1.0


def test_it_works_inside_the_runners_worker_processes():
    good, bad, endless = (
        block(f"def add(a, b): {body}") for body in ("return a + b", "return 4", "\n    while True: pass")
    )
    spec = {"fn": "rewards.code:code_reward", "timeout": 20, "params": {"timeout_s": 0.5}}
    runner = RewardRunner([spec], workers=2)
    try:
        for key in range(4):
            runner.submit(key, [good, bad, "nothing", endless], {"tests": ADD})
        done = {}
        while len(done) < 4:
            done.update(runner.completed(timeout_s=30))
    finally:
        runner.close()
    assert [[score.verdict for score in done[key][0]] for key in range(4)] == [
        ["correct", "wrong", "unparsed", "timeout"]
    ] * 4


# -- data sets (a sample; benchmarks/sandbox.py runs them whole) -----------------------------------------------------


def human_eval(row: dict, body: str) -> Score:
    limits = {"timeout_s": 20, "total_s": 40}  # a busy machine is no reason to fail a reference
    return code_reward(block(row["prompt"] + body), row["test"], row["entry_point"], row["prompt"], **limits)


def mbpp(row: dict, text: str) -> Score:
    limits = {"timeout_s": 20, "total_s": 40}
    tests = row["test_list"] + row["challenge_test_list"]
    return code_reward(block(text), tests, prepare=row["test_setup_code"], **limits)


def test_human_eval_references_pass_and_empty_bodies_do_not():
    sample = rows("humaneval.jsonl")[2::8]  # with 38 and 50, whose tests use helpers of the prompt
    assert [row["task_id"] for row in sample if human_eval(row, row["canonical_solution"]).verdict != "correct"] == []
    assert [row["task_id"] for row in sample if human_eval(row, "    return None\n").verdict != "wrong"] == []


def test_mbpp_references_pass_and_another_tasks_do_not():
    everything = rows("mbpp.jsonl")
    odd = [row for row in everything if row["test_setup_code"]]  # tests that build objects of the candidate's classes
    sample = everything[::40] + odd
    assert [row["task_id"] for row in sample if mbpp(row, row["code"]).verdict != "correct"] == []
    other = [mbpp(row, everything[i - 1]["code"]).verdict for i, row in enumerate(sample[:8])]
    assert set(other) == {"wrong"}


def test_contest_rows_are_read_and_an_echo_of_the_input_fails():
    for row in rows("code_contests_stdio_165.jsonl")[::20]:
        tests = parse_tests(row["tests"])
        assert isinstance(tests, ProgramTests)
        cases = {"inputs": tests.inputs[:1], "outputs": tests.expected[:1]}
        assert code_reward(block("import sys\nprint(sys.stdin.read() + 'x')"), cases).verdict == "wrong"
        told = f"print({tests.expected[0]!r})"  # knows the answer: what it prints is compared as printed
        assert code_reward(block(told), cases).verdict == "correct"


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (
            {"prompt": "def two():\n    'It is 2.'\n", "entry_point": "two",
             "test": "def check(candidate):\n    assert candidate() == 2\n"},
            "def two():\n    return 2\n",
        ),
        ({"test_list": ["assert add(1, 2) == 3"], "test_setup_code": None}, "def add(a, b): return a + b\n"),
        ({"test_list": ["assert math.isclose(f(), 2.0)"], "test_imports": ["import math"]}, "def f(): return 2.0\n"),
        ({"input_output": '{"inputs": ["3\\n"], "outputs": ["6\\n"]}'}, "print(2 * int(input()))\n"),
        ({"public_tests": {"input": ["3\n"], "output": ["6\n"]}}, "print(2 * int(input()))\n"),
    ],
    ids=["humaneval", "mbpp", "mbpp sanitized", "apps", "code contests"],
)  # fmt: skip
def test_rows_of_public_sets_are_taken_as_they_are(row, right):
    reward = load_reward("rewards.code:code_reward")
    assert reward.check_row(row) is None
    assert reward.one(f"```python\n{right}```", row).verdict == "correct"
    assert reward.one("```python\ndef two(): return 3\nadd = f = lambda *a: 7\n```", row).verdict == "wrong"


def test_a_row_without_tests_can_never_be_paid():
    reward = load_reward("rewards.code:code_reward")
    assert "found none of the columns tests, test" in reward.check_row({"prompt": "Add.", "answer": "3"})
