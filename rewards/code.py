"""Code rewards: function-call, stdin/stdout, plain-script and assert-style tests, run in the sandbox.

    code_reward(completion, tests={"inputs": ["1 2\\n"], "outputs": ["3\\n"]})                     # stdin/stdout
    code_reward(completion, tests={"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]})          # function calls
    code_reward(completion, tests=["assert add(1, 2) == 3"])                                       # assertions
    code_reward(completion, tests="def check(candidate): ...", entry_point="add", setup=prompt)    # HumanEval
    code_reward(completion, tests={"stdout": "hello\\n"})                                          # a plain script

Expected values never enter the process that runs the candidate. What goes wrong on our side (a
missing isolation layer, no memory) is verdict `error`, never a score.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards.sandbox import Limits, Run, Sandbox, SandboxError, values
from rewards.sandbox.compare import same_output, same_value
from rewards.score import Score, Verdict

Credit = Literal["all", "share"]

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*$")
_PYTHON = {"", "python", "python3", "py", "py3"}
_END_OF_TEXT = re.compile(
    r"<\|(?:endoftext|im_end|im_start|eot_id|end_of_text|start_header_id|end|user|system)\|>|</s>|<eos>|<end_of_turn>"
    r"|<start_of_turn>|<｜(?:end▁of▁sentence|begin▁of▁sentence|User)｜>"
)
_OTHER_SPEAKER = re.compile(r"(?:#{1,6} *)?(?:user|human|question|problem|instruction) *(?::|$)", re.IGNORECASE)


# -- what to run ---------------------------------------------------------------------------------------------------


def extract_code(completion: str, language: str = "python") -> str | None:
    """The code that a completion answers with, or None.

    The completion is cut at an end-of-sequence token; what counts is after the last `</think>`, inside `<answer>` when
    there is one (exactly one), before the model writes another speaker's turn: there, the last closed fence of this
    language. Reasoning or a fence that is still open, or no fence: no answer.
    """
    _check_language(language)
    text = _END_OF_TEXT.split(completion, maxsplit=1)[0]
    part = text.rpartition("</think>")[2]
    if "<think>" in part:
        return None
    opens, closes = part.count("<answer>"), part.count("</answer>")
    if opens or closes:
        start, stop = part.find("<answer>"), part.find("</answer>")
        if (opens, closes) != (1, 1) or stop < start:
            return None
        part = part[start + len("<answer>") : stop]
    codes, fence, lines = [], None, []
    for line in part.split("\n"):
        match = _FENCE.match(line)
        if fence is None:
            if match:
                fence, lines = match, []
            elif codes and _OTHER_SPEAKER.match(line.strip()):
                break
        elif match and match[1][0] == fence[1][0] and len(match[1]) >= len(fence[1]) and not match[2]:
            if fence[2].lower() in _PYTHON:
                codes.append("\n".join(lines) + "\n")
            fence = None
        else:
            lines.append(line)
    return codes[-1] if codes and fence is None else None


def _check_language(language: str) -> None:
    if language != "python":
        raise ValueError(f"language is {language!r}; supported: 'python'")


# -- what it is tested with ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallTests:
    """Calls `entry` with each of `inputs` (arguments, keywords) and compares with `expected` by kind and value, see
    `compare.same_value`. `lists`: the expected values were written in JSON, where tuples are lists and 2.0 may be 2."""

    entry: str
    inputs: list[tuple[tuple, dict]]
    expected: list[object]
    setup: str = ""
    lists: bool = False


@dataclass(frozen=True)
class ProgramTests:
    """Runs the program once for each of `inputs` and compares standard output with `expected`, word by word."""

    inputs: list[str]
    expected: list[str]


@dataclass(frozen=True)
class AssertTests:
    """Runs each of `tests` (Python source) in a tester process; `entries` are the candidate's names (default: the names
    only it can define), `setup` task code for both sides, `prepare` test code that comes before the tests."""

    tests: list[str]
    entries: tuple[str, ...] = ()
    setup: str = ""
    prepare: str = ""


Tests = CallTests | ProgramTests | AssertTests


def parse_tests(tests: object, entry_point: str | None = None, setup: str = "", prepare: str = "") -> Tests:
    """The tests of a data row (a mapping, a list of assertions, a source text, or JSON of one of them) as one of the
    three kinds. `entry_point` names what the candidate defines, several with commas ("solve, Node"); without it these
    are the names that nothing else defines. Raises `ValueError` saying what was found and what is expected."""
    if isinstance(tests, CallTests | ProgramTests | AssertTests):
        return tests
    entries = tuple(name.strip() for name in (entry_point or "").split(",") if name.strip())
    if isinstance(tests, str):
        if tests.lstrip()[:1] in ("{", "["):
            try:
                return parse_tests(json.loads(tests), entry_point, setup, prepare)
            except json.JSONDecodeError:
                pass  # source text that begins with a display
        if re.search(r"^def check\(", tests, re.MULTILINE):
            if not entry_point:
                raise ValueError("tests define check(candidate): entry_point must name the candidate's function")
            return AssertTests([f"{tests}\n\ncheck({entries[0]})\n"], entries, setup, prepare)
        return AssertTests([tests], entries, setup, prepare)
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return AssertTests(tests, entries, setup, prepare)
    if isinstance(tests, dict) and set(tests) == {"stdout"}:
        return ProgramTests([""], [tests["stdout"]])
    if isinstance(tests, dict) and {"inputs", "outputs"} <= set(tests):
        inputs, outputs, entry = tests["inputs"], tests["outputs"], tests.get("fn_name") or entry_point
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(
                f"tests hold {len(inputs)} inputs and {len(outputs)} outputs, expected as many, at least 1"
            )
        if entry:
            calls = [(tuple(i), {}) if isinstance(i, list | tuple) else ((), dict(i)) for i in inputs]
            return CallTests(entry, calls, list(outputs), setup, lists=True)
        if all(isinstance(text, str) for text in [*inputs, *outputs]):
            return ProgramTests(list(inputs), list(outputs))
    raise ValueError(
        f"tests are {str(tests)[:120]!r}; expected {{'inputs', 'outputs'}} of texts, the same with 'fn_name', "
        "{'stdout'}, a list of assertions, or source with check(candidate)"
    )


# -- the checks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One test: `why` says in words what happened when it did not pass."""

    verdict: Verdict
    why: str = ""


def check(
    sandbox: Sandbox, code: str, tests: Tests, *, limits: Limits, credit: Credit = "all", tolerance: float | None = None
) -> list[Outcome]:
    """One outcome per test, in order; with credit "all" the list ends at the first that fails.

    Raises `SandboxError` where the sandbox, and `ValueError` where the tests are to blame.
    """
    run = {CallTests: _check_calls, ProgramTests: _check_programs, AssertTests: _check_asserts}[type(tests)]
    count = len(tests.tests if isinstance(tests, AssertTests) else tests.inputs)
    outcomes: list[Outcome] = []
    until = time.monotonic() + limits.total_s - sandbox.forgiven_s
    while len(outcomes) < count and (credit == "share" or all(o.verdict == "correct" for o in outcomes)):
        left_s = until + sandbox.forgiven_s - time.monotonic()
        if left_s <= 0:
            outcomes += [Outcome("timeout", f"no time left of {limits.total_s} s")] * (count - len(outcomes))
            break
        remaining = dataclasses.replace(limits, total_s=left_s)
        outcomes += run(sandbox, code, tests, len(outcomes), remaining, tolerance)
    if credit == "all":
        failed = next((i for i, o in enumerate(outcomes) if o.verdict != "correct"), count)
        return outcomes[: failed + 1]
    return outcomes


def _check_calls(
    sandbox: Sandbox, code: str, tests: CallTests, first: int, limits: Limits, tolerance: float | None
) -> list[Outcome]:
    run = sandbox.call(code, tests.entry, tests.inputs[first:], setup=tests.setup, limits=limits)
    if run.load is not None:
        return [Outcome("wrong", run.load)] * (len(tests.inputs) - first)
    outcomes = [
        _judge_answer(frame, expected, tolerance, tests.lists)
        for frame, expected in zip(run.frames, tests.expected[first:], strict=False)
    ]
    return outcomes + _unanswered(run, len(tests.inputs) - first - len(outcomes))


def _judge_answer(frame: dict, expected: object, tolerance: float | None, lists: bool) -> Outcome:
    if "value" not in frame:
        return Outcome("wrong", f"raised {_raised(frame)}")
    try:
        actual = values.decode(frame["value"])
    except values.BadValue as error:
        return Outcome("wrong", f"unreadable answer: {error}")
    if same_value(expected, actual, tolerance, lists, exact=False):
        return Outcome("correct")
    if actual is None and expected is not None and "argument" in frame:  # it changed its argument in place
        return _judge_answer({"value": frame["argument"]}, expected, tolerance, lists)
    return Outcome("wrong", "another value")


def _raised(frame: dict) -> str:
    raised = frame.get("raised")
    return f"{values.text_of(raised, 'type')}: {values.text_of(raised, 'message')}"


def _unanswered(run: Run, missing: int) -> list[Outcome]:
    """The first test without an answer, told by how the process ended; the ones after it are another run's."""
    if missing <= 0:
        return []
    if run.end == "timeout":
        return [Outcome("timeout", "no answer in time")]
    return [Outcome("wrong", _ending(run))]


def _ending(run: Run) -> str:
    if run.end == "output":
        return "said more than allowed"
    if run.exit_code < 0:
        return f"ended by signal {-run.exit_code}"
    return f"ended early with exit code {run.exit_code}"


def _check_programs(
    sandbox: Sandbox, code: str, tests: ProgramTests, first: int, limits: Limits, tolerance: float | None
) -> list[Outcome]:
    run = sandbox.program(code, tests.inputs[first].encode("utf-8", "surrogatepass"), limits=limits)
    if run.end == "timeout":
        return [Outcome("timeout", "did not end in time")]
    if run.end != "finished" or run.exit_code != 0:
        raised = next((f"raised {_raised(frame)}" for frame in run.frames if "raised" in frame), None)
        return [Outcome("wrong", raised or _ending(run))]
    if same_output(tests.expected[first], run.output.decode("utf-8", "replace"), tolerance):
        return [Outcome("correct")]
    return [Outcome("wrong", "another output")]


def _check_asserts(
    sandbox: Sandbox, code: str, tests: AssertTests, first: int, limits: Limits, tolerance: float | None
) -> list[Outcome]:
    run = sandbox.asserts(
        code, tests.tests, first=first, entries=tests.entries, setup=tests.setup, prepare=tests.prepare, limits=limits
    )
    outcomes = []
    for number, frame in enumerate(run.frames, first):
        if "broken" in frame:
            raise ValueError(f"test {number} cannot be run: {frame['broken']}")
        if frame.get("test") != number:
            raise SandboxError(f"the tester reported test {frame.get('test')!r}, expected {number}")
        if frame.get("passed") is True:
            outcomes.append(Outcome("correct"))
        else:
            outcomes.append(Outcome("wrong", run.load or frame.get("why", "")))
    if run.load is not None:
        return [Outcome("wrong", run.load)] * (len(tests.tests) - first)
    if run.end != "finished" or not outcomes:
        outcomes += _unanswered(run, len(tests.tests) - first - len(outcomes))
    return outcomes


# -- the reward ----------------------------------------------------------------------------------------------------

_sandboxes: dict[tuple[int, str], Sandbox] = {}
_starting = threading.Lock()


def _sandbox(isolation: str) -> Sandbox:
    """This process's sandbox: started at the first call, replaced when it failed."""
    key = (os.getpid(), isolation)
    with _starting:
        if key not in _sandboxes or _sandboxes[key].closed:
            if not _sandboxes:
                atexit.register(close)
            _sandboxes[key] = Sandbox(isolation=isolation)
        return _sandboxes[key]


def close() -> None:
    """Ends this process's sandboxes."""
    for sandbox in list(_sandboxes.values()):
        sandbox.close()
    _sandboxes.clear()


def tests_of_row(row: Mapping[str, Any]) -> Tests:
    """The tests of a row. Columns of public sets are known: `test` with `prompt` and `entry_point` (HumanEval),
    `test_list` with `test_setup_code` or `test_imports` (MBPP), `input_output` or `public_tests` with their two lists
    (APPS, CodeContests). Raises `ValueError` where there are none or they make no sense."""
    names = ("tests", "test", "test_list", "input_output", "public_tests")
    tests = next((row[name] for name in names if row.get(name) is not None), None)
    if tests is None:
        raise ValueError(f"no tests: found none of the columns {', '.join(names)}")
    if isinstance(tests, Mapping) and "input" in tests and "output" in tests:
        tests = {"inputs": tests["input"], "outputs": tests["output"]}
    setup = row.get("setup") or ""
    if row.get("tests") is None:
        given = row.get("prompt") if row.get("test") is not None else row.get("test_setup_code")
        setup = setup or (given if isinstance(given, str) else "")
        setup = "\n".join([*(row.get("test_imports") or ()), setup])
    return parse_tests(tests, row.get("entry_point"), setup, row.get("prepare") or "")


def check_row(row: Mapping[str, Any]) -> str | None:
    """Why no program can pass on this row: its tests are missing or make no sense; None when one can."""
    try:
        tests_of_row(row)
    except ValueError as error:
        return str(error)
    return None


def code_reward(
    completion: str,
    tests: object = None,
    entry_point: str | None = None,
    setup: str = "",
    prepare: str = "",
    *,
    test: object = None,
    test_list: object = None,
    test_setup_code: str = "",
    test_imports: Sequence[str] = (),
    input_output: object = None,
    public_tests: object = None,
    prompt: object = None,
    language: str = "python",
    fence: bool = True,
    credit: Credit = "all",
    float_tolerance: float | None = None,
    timeout_s: float = 4.0,
    total_s: float = 4.5,
    memory_mb: int = 512,
    isolation: str = "namespaces",
) -> Score:
    """1 when the completion's code passes `tests` (`parse_tests` lists the forms; `tests_of_row` the columns of public
    sets, `test` to `prompt`), else 0; with credit "share" the share of tests passed.

    `timeout_s` is wall time a test, `total_s` of all tests: keep it below the timeout that a run gives this reward (5 s
    by default), so that a slow answer ends here and not with its worker. `fence=False` takes the whole completion as
    code (a base model that continues a prompt). Verdicts: `unparsed` without a code block, `timeout` when
    the first failure is one, `error` (value NaN, reason in `detail`) when the sandbox failed or a test can only be
    judged by the candidate itself. Metrics: `passed_share`, `tests_run`. Raises `ValueError` for tests or options that
    make no sense.
    """
    _check_language(language)
    if credit not in ("all", "share"):
        raise ValueError(f"credit is {credit!r}, expected 'all' or 'share'")
    columns = {"tests": tests, "entry_point": entry_point, "setup": setup, "prepare": prepare, "test": test}
    columns |= {"test_list": test_list, "test_setup_code": test_setup_code, "test_imports": test_imports}
    columns |= {"input_output": input_output, "public_tests": public_tests, "prompt": prompt}
    parsed = tests_of_row(columns)
    limits = Limits(timeout_s=timeout_s, total_s=total_s, memory_bytes=memory_mb << 20)
    code = extract_code(completion, language) if fence else completion
    if code is None:
        return Score(0.0, "unparsed", {"passed_share": 0.0}, "no closed code block where the answer belongs")
    try:
        outcomes = check(_sandbox(isolation), code, parsed, limits=limits, credit=credit, tolerance=float_tolerance)
    except SandboxError as error:
        return Score.error(f"the sandbox could not check a completion: {error}")
    except ValueError as error:
        return Score.error(f"the tests cannot be judged: {error}")
    return score(outcomes, parsed, credit)


code_reward.expects = "a whole program in a fenced block, ```python ... ```, the last one counts"  # type: ignore[attr-defined]
code_reward.check_row = check_row  # type: ignore[attr-defined]


def score(outcomes: list[Outcome], tests: Tests, credit: Credit) -> Score:
    """The `Score` of the outcomes of `check`."""
    count = len(tests.tests if isinstance(tests, AssertTests) else tests.inputs)
    passed = sum(outcome.verdict == "correct" for outcome in outcomes)
    share = passed / count
    failed = next(((i, outcome) for i, outcome in enumerate(outcomes) if outcome.verdict != "correct"), None)
    verdict: Verdict = "correct" if failed is None else failed[1].verdict
    value = share if credit == "share" else float(failed is None)
    detail = f"{passed} of {count} tests passed" + (f"; test {failed[0]}: {failed[1].why}" if failed else "")
    return Score(value, verdict, {"passed_share": share, "tests_run": float(len(outcomes))}, detail)
