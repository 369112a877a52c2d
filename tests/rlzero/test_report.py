"""What a run leaves behind: complete lines, a page that needs nothing from outside, plots that show the numbers."""

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rewards.score import Score
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.report.display import Display
from rlzero.report.html import curve_svg, summary, write_report
from rlzero.report.log import TEXT_KEPT, RunLog, read_lines
from rlzero.report.plots import Series, line_chart, running_mean, stacked_bars, ticks
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout

SVG = "{http://www.w3.org/2000/svg}"


def group(text: str, verdict: str = "correct") -> Group:
    rollout = Rollout("p", 0, (1,), [1, 2], [0.0, 0.0], [(0, 2)], "stop", text)
    return Group(
        Prompt("p", "template", (1,), {"prompt": "Make 8 from 3, 5."}), [rollout], [[Score(1.0, verdict), None]]
    )


def step_line(step: int) -> dict:
    return {
        "step": step, "reward_mean": 1.0 + step / 10, "reward/countdown_reward": step / 10, "reward/format_reward": 1.0,
        "length_mean": 40.0, "kl_reference": 1e-3, "entropy": 0.5, "gap": 1e-6, "rollout_tokens": 1000.0,
        "time_rollout_s": 2.0, "time_train_s": 1.0, "time_sync_s": 0.5, "time_step_s": 4.0,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    log = RunLog(tmp_path / "demo")
    log.evaluation({"step": 0, "pass_at_1": 0.25, "cons_at_k": 0.375, "n": 8, "prompts": 64, "time_s": 5.0})
    for step in range(6):
        log.metrics(step_line(step))
        log.samples(step, group(f"<think>try {step}</think> <answer>3+5</answer>", "correct" if step > 3 else "wrong"))
    log.evaluation({"step": 6, "pass_at_1": 0.75, "cons_at_k": 0.875, "n": 8, "prompts": 64, "time_s": 6.0})
    (tmp_path / "demo" / "config.yaml").write_text("name: demo\nseed: 3\nsteps: 6\n")
    return tmp_path / "demo"


# --- the log ---


def test_lines_are_json_with_null_for_what_is_no_number(tmp_path):
    log = RunLog(tmp_path)
    log.metrics({"step": 0, "reward_mean": math.nan, "kl": math.inf, "ok": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "reward_mean": None,
        "kl": None,
        "ok": 1.5,
    }


def test_a_resumed_run_takes_out_the_steps_it_does_again_and_keeps_the_evaluation_before_them(run_dir):
    log = RunLog(run_dir)
    log.evaluation({"step": 4, "pass_at_1": 0.5})
    log.rewind(4)
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [line["step"] for line in read_lines(run_dir / "samples.jsonl")] == [0, 1, 2, 3]
    assert log.evaluated == {0, 4}


def test_a_run_that_starts_over_keeps_nothing(run_dir):
    RunLog(run_dir).rewind(0, evaluations=False)
    assert all(read_lines(run_dir / name) == [] for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"))


def test_a_line_cut_short_by_a_kill_is_dropped_before_the_next_is_written(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert len(read_lines(run_dir / "metrics.jsonl")) == 6
    RunLog(run_dir).metrics(step_line(6))
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == list(range(7))


def test_long_completions_keep_their_start_and_end(tmp_path):
    RunLog(tmp_path).samples(0, group("start " + "x" * 20_000 + " end"))
    (text,) = (c["text"] for c in read_lines(tmp_path / "samples.jsonl")[0]["completions"])
    assert text.startswith("start ") and text.endswith(" end") and "14010 characters left out" in text
    assert len(text) < TEXT_KEPT + 100


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, ["tensorboard"])
    for step in range(3):
        log.metrics(step_line(step))
    log.evaluation({"step": 3, "pass_at_1": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [round(e.value, 6) for e in events.Scalars("reward_mean")] == [1.0, 1.1, 1.2]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/pass_at_1")] == [(3, 0.5)]


def test_a_tracker_that_is_not_installed_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"wandb is named in the config but not installed; pip install 'rlzero\[tracking\]'"
    ):
        RunLog(tmp_path, ["wandb"])


# --- summary and page ---


def test_the_summary_counts_steps_and_evaluations(run_dir):
    figures = summary(run_dir)
    assert figures["pass_at_1_before"] == 0.25 and figures["pass_at_1_after"] == 0.75
    assert figures["wall_s"] == 6 * 4.0 + 5.0 + 6.0
    assert (figures["steps"], figures["rollout_tokens"], figures["seed"]) == (6, 6000, 3)


def test_write_report_leaves_page_and_summary(run_dir):
    page = write_report(run_dir)
    assert page == run_dir / "report.html"
    assert json.loads((run_dir / "summary.json").read_text()) == summary(run_dir)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no run has written here"):
        write_report(tmp_path)


class Page(HTMLParser):
    """Collects tags, text and everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_shows_everything_asked_for(run_dir):
    page = Page()
    html = write_report(run_dir).read_text()
    page.feed(html)
    assert page.fetched == [] and "@import" not in html and "url(" not in html and "script" not in page.tags
    assert "prefers-color-scheme:dark" in html
    assert page.tags.count("svg") == 7
    text = " ".join(page.text)
    for part in ("25.0 %", "75.0 %", "pass@1 and cons@k", "Reward", "Completion length", "KL to the reference",
                 "Entropy", "Gap between engine and trainer", "Time of a step",
                 "Start: step 0", "Middle: step 3", "End: step 5", "Make 8 from 3, 5."):  # fmt: skip
        assert part in text, part


def test_a_run_on_gpus_shows_its_memory_beside_the_plan(run_dir):
    RunLog(run_dir).metrics({**step_line(6), "memory_planned_bytes": 4e10, "memory_device_bytes": 3.8e10})
    html = write_report(run_dir).read_text()
    assert "GPU memory" in html and "held of it" in html and ">engine<" not in html


def test_a_run_without_evaluation_or_samples_still_has_a_page(tmp_path):
    RunLog(tmp_path).metrics({"step": 0, "reward_mean": 0.5})
    html = write_report(tmp_path).read_text()
    assert "no values" in html and summary(tmp_path)["pass_at_1_before"] is None


def test_what_a_model_wrote_cannot_become_part_of_the_page(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(step_line(0))
    log.samples(0, group("<think></think><script>alert(1)</script><img src=x onerror=alert(2)>"))
    page = Page()
    page.feed(write_report(tmp_path).read_text())
    assert "script" not in page.tags and "img" not in page.tags
    assert "<script>alert(1)</script>" in "".join(page.text)


# --- plots ---


def test_a_line_goes_through_its_values():
    xs, ys = [0, 1, 2, 3, 4], [1.0, 3.0, None, 2.0, 5.0]
    svg = ElementTree.fromstring(line_chart("t", [Series("a", xs, ys)], y_range=(0.0, 5.0)))
    path = next(e for e in svg.iter(f"{SVG}path") if e.get("class") == "curve s0").get("d")
    points = [(m[0], float(m[1]), float(m[2])) for m in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]
    assert [p[0] for p in points] == ["M", "L", "M", "L"]  # the value that is missing leaves a gap
    # Undo the scale from two points, then compare the others.
    (x0, y0), (x1, y1) = points[0][1:], points[3][1:]
    value = [1.0 + (p[2] - y0) / (y1 - y0) * 4.0 for p in points]
    step = [(p[1] - x0) / (x1 - x0) * 4 for p in points]
    assert value == pytest.approx([1.0, 3.0, 2.0, 5.0], abs=0.02) and step == pytest.approx([0, 1, 3, 4], abs=0.02)


def test_stacked_bars_are_as_high_as_their_sums():
    svg = ElementTree.fromstring(stacked_bars("t", [0, 1], {"a": [1.0, 2.0], "b": [3.0, None]}))
    bars = [[float(r.get("height")) for r in g.iter(f"{SVG}rect")] for g in svg.iter(f"{SVG}g")]
    assert [len(bar) for bar in bars] == [2, 1]
    assert bars[0][1] / bars[0][0] == pytest.approx(3.0, abs=0.02) and sum(bars[0]) / bars[1][0] == pytest.approx(
        2.0, abs=0.02
    )


def test_many_steps_are_averaged_into_few_bars():
    svg = ElementTree.fromstring(stacked_bars("t", list(range(1000)), {"a": [1.0] * 1000}, bins=100))
    assert len(list(svg.iter(f"{SVG}rect"))) == 100


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.00012), (-3.0, 17.0), (0.0, 4321.0), (1.0, 1.0)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 8 and all(low <= t <= high for t in found)
    if len(found) > 1:
        step = found[1] - found[0]
        assert float(f"{step:.0e}".split("e")[0]) in (1, 2, 5) or step / 10 ** math.floor(
            math.log10(step)
        ) == pytest.approx(2.5)


def test_the_running_mean_is_centred_and_leaves_gaps():
    assert running_mean([1.0, 2.0, None, 4.0], 3) == [1.5, 1.5, None, 4.0]


def test_the_readme_curve_is_one_well_formed_picture(run_dir, tmp_path):
    path = curve_svg(run_dir, tmp_path / "docs" / "curve.svg")
    svg = ElementTree.parse(path).getroot()
    text = "".join(svg.itertext())
    assert "pass@1" in text and "countdown_reward" in text and "mean reward" not in text
    assert len([e for e in svg.iter(f"{SVG}circle")]) == 4  # two evaluations of two figures


# --- the display ---


def test_without_a_terminal_every_event_is_one_plain_line(tmp_path):
    (tmp_path / "c.yaml").write_text("policy: {path: b}\ndata: {train: countdown}\nrewards: [{fn: 'a:b'}]\nsteps: 10\n")
    config = Config.load(tmp_path / "c.yaml")
    out = io.StringIO()
    with Display(config, Console(file=out, force_terminal=False, width=300)) as display:
        display("engine: torch (no CUDA device)", {})
        display("evaluation", {"step": 0, "pass_at_1": 0.25, "cons_at_k": 0.5, "n": 8})
        display("step", step_line(0))
    assert out.getvalue().splitlines() == [
        "engine: torch (no CUDA device)",
        "evaluation at step 0: pass@1 25.0%, cons@8 50.0%",
        "step 1/10  reward 1.000  length 40.0  entropy 0.500  kl 0.001  gap 1.0e-06  "
        "4.0 s (rollout 2.0, train 1.0, sync 0.5)  ETA 36 s",
    ]


def test_on_a_terminal_progress_parts_and_eta_are_shown(tmp_path):
    (tmp_path / "c.yaml").write_text("policy: {path: b}\ndata: {train: countdown}\nrewards: [{fn: 'a:b'}]\nsteps: 10\n")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110)
    with Display(Config.load(tmp_path / "c.yaml"), console) as display:
        for step in range(2):
            display("step", step_line(step))
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for part in ("2/10", "ETA 32 s", "reward 1.100", "rollout 2.0", "train 1.0", "of 4.0 s"):
        assert part in last, part
