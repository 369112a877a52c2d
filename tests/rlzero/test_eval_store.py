"""Evaluations of benchmarks: outcomes stored once, figures of the store alone, nothing missing taken for wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards.workers.runner import RewardRunner
from rlzero.cli import main
from rlzero.config.read import UsageError
from rlzero.eval import words
from rlzero.eval.figures import compare, figures, parts
from rlzero.eval.store import Sample, Store, load
from rlzero.eval.tasks.task import Question, find, names

DATA = Path(__file__).parents[3] / "shared" / "data"
META = {
    "model": "m", "samples": 2, "template": "none", "tasks": {"t": {"votes": True}},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9},
}  # fmt: skip


def questions(count: int) -> dict[str, list[Question]]:
    return {"t": [Question(str(i), f"q{i}", {}, level=str(i % 2)) for i in range(count)]}


def sample(question: int, number: int, verdict: str | None, answer: str | None = None, **more) -> Sample:
    return Sample("t", str(question), number, "text", 5, more.pop("finish", "stop"), verdict, 1.0, answer, **more)


def fill(folder: Path, samples: list[Sample], count: int = 2, **meta):
    store = Store(folder, {**META, **meta}, questions(count))
    for one in samples:
        store.add(one)
    store.close()
    return load(folder)


def test_a_store_goes_on_from_its_last_whole_line_and_only_with_the_same_evaluation(tmp_path):
    fill(tmp_path, [sample(0, 0, "correct"), sample(0, 1, "error")])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"task": "t", "ques')
    store = Store(tmp_path, META, questions(2))
    assert store.done == {("t", "0", 0)}  # what failed is asked again
    store.add(sample(0, 1, "wrong"))
    store.close()
    assert load(tmp_path).samples["t"]["0"][1].verdict == "wrong"
    with pytest.raises(UsageError, match="samples was 2, now 3"):
        Store(tmp_path, {**META, "samples": 3}, questions(2))


def test_a_damaged_line_is_named(tmp_path):
    fill(tmp_path, [sample(0, 0, "correct")])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("{nonsense\n")
    with pytest.raises(UsageError, match=r"samples.jsonl:2: a damaged line"):
        load(tmp_path)


def test_samples_without_a_verdict_are_shown_and_widen_the_interval(tmp_path):
    whole = [sample(q, i, "correct" if q < 6 else "wrong") for q in range(12) for i in range(2)]
    before = figures(fill(tmp_path / "a", whole, 12), "t")
    lost = [s if s.question != "0" else sample(0, s.sample, "error") for s in whole]
    after = figures(fill(tmp_path / "b", lost[:-1], 12), "t")
    assert (after.errors, after.missing, after.empty) == (2, 1, 1) and after.questions == 12
    assert after.pass_at_1.low <= before.pass_at_1.low and after.pass_at_1.high >= before.pass_at_1.high
    assert "whatever they would have been" in "\n".join(words.describe(load(tmp_path / "b")))
    nothing = figures(fill(tmp_path / "c", [sample(0, 0, None, finish="failed")]), "t")
    assert nothing.pass_at_1 is None and nothing.missing == 4


def test_figures_by_level_and_votes_by_equal_answers(tmp_path):
    found = fill(
        tmp_path, [sample(0, 0, "correct", "1/2"), sample(0, 1, "correct", "0.5"), sample(1, 0, "wrong", "3"),
                   sample(1, 1, "unparsed")],
    )  # fmt: skip
    assert figures(found, "t").cons_at[2].mean == 0.5 and figures(found, "t").unparsed == 0.25
    by_level = parts(found, "t")
    assert by_level["level 0"].pass_at_1.mean == 1.0 and by_level["level 1"].pass_at_1.mean == 0.0


def test_two_models_are_compared_on_the_questions_both_have(tmp_path):
    one = fill(tmp_path / "a", [sample(q, i, "wrong") for q in range(20) for i in range(2)], 20)
    two = fill(tmp_path / "b", [sample(q, i, "correct") for q in range(15) for i in range(2)], 20, model="n")
    found, adjusted = compare(one, two)["t"]
    assert found.difference == 1.0 and found.questions == 15 and adjusted < 0.001


@pytest.mark.skipif(not DATA.exists(), reason="the data sets of shared/data are not beside this checkout")
@pytest.mark.parametrize("name", ["gsm8k", "math500", "humaneval", "mbpp", "countdown"])
def test_reference_solutions_are_right(name):
    task, source = find(name)
    asked = task.questions(source, DATA, 60)
    spec = {"fn": task.reward, "timeout_s": task.timeout_s, "params": task.params}
    with RewardRunner([spec], workers=2, max_error_share=1.0) as rewards:
        for question in asked:
            rewards.submit(question.id, [question.reference], question.columns)
        verdicts: dict[str, str] = {}
        while len(verdicts) < len(asked):
            verdicts |= {key: scores[0][0].verdict for key, scores in rewards.completed(5.0)}
    assert [key for key, verdict in verdicts.items() if verdict != "correct"] == []


ROWS = {
    "aime": {"problem": "p", "answer": "025"},
    "gpqa": {"Question": "q", "Correct Answer": "a", **{f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}},
    "mmlu": {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2},
    "livecodebench": {"question_content": "q", "public_test_cases": '[{"input": "1", "output": "2"}]'},
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_of_files_that_people_bring_are_read(name, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    task, source = find(f"{name}:{file}")
    (question,) = task.questions(source, tmp_path)
    if name == "livecodebench":
        assert question.columns["tests"] == {"inputs": ["1"], "outputs": ["2"]}
    else:
        answer = {"aime": "25", "mmlu": "C"}.get(name, question.columns["answer"])
        assert question.columns["answer"] == answer and question.reference == f"\\boxed{{{answer}}}"
        assert name != "gpqa" or f"({answer}) a" in question.prompt


def test_a_row_or_a_task_that_is_none_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"answer": "1"}\n')
    task, source = find(f"gsm8k:{file}")
    with pytest.raises(UsageError, match=r"rows.jsonl:1: not a row of gsm8k.*found the columns answer"):
        task.questions(source, tmp_path)
    with pytest.raises(UsageError, match="no task 'gsm9k'; there are aime, countdown"):
        find("gsm9k")
    assert "task" not in names()


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["rlzero", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_model_is_asked_once_and_shown_as_one_likes(tiny_policy, monkeypatch, capsys, tmp_path, local_ray):
    arguments = ("eval", tiny_policy, "rollout.engine=torch", "threads=1", "--tasks", "countdown", "--n", 2,
                 "--limit", 3, "--max-tokens", 8, "--store", tmp_path / "s", "--template", "none")  # fmt: skip
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "countdown: 3 questions" in out and "pass@1" in out
    lines = (tmp_path / "s" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6
    (tmp_path / "s" / "samples.jsonl").write_text("\n".join(lines[:2]) + "\n")
    run(monkeypatch, capsys, *arguments)
    assert sorted((tmp_path / "s" / "samples.jsonl").read_text().splitlines()) == sorted(lines)
    code, out, _ = run(monkeypatch, capsys, "eval", "show", tmp_path / "s", tmp_path / "s")
    assert code == 0 and "not told apart" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--tasks", "countdown"), "nowhere"),
        (("MODEL", "--tasks", "gsm8k"), "no file data/gsm8k_test.jsonl"),
        (("MODEL", "--tasks", "countdown", "--n", 2, "--temperature", 0), "all the same"),
        (("show", "nowhere"), "no evaluation is stored here"),
    ],
)
def test_what_cannot_be_asked_ends_with_a_sentence(arguments, message, tiny_policy, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, "eval", *[tiny_policy if a == "MODEL" else a for a in arguments])
    assert code == 2 and message in err
