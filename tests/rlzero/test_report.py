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
from rlzero.config.rl import Config, Reward
from rlzero.report.display import Display
from rlzero.report.html import curve_svg, summary, write_report
from rlzero.report.log import FILES, TEXT_KEPT, RunLog, read_lines
from rlzero.report.plots import Series, line_chart, running_mean, stacked
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout

SVG = "{http://www.w3.org/2000/svg}"


def group(text: str, verdict: str = "correct") -> Group:
    rollout = Rollout("p", 0, (1,), [1, 2], [0.0, 0.0], [(0, 2)], "stop", text)
    return Group(
        Prompt("p", "template", (1,), {"prompt": "Make 8 from 3, 5.", "target": 8}),
        [rollout],
        [[Score(0.5, "correct"), Score(1.0, verdict, detail="equals 8"), None]],
    )


REWARDS = [Reward(fn="m:form", weight=0.1), Reward(fn="m:task"), Reward(fn="m:other", weight=9)]


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
        text = f"<think>try {step}</think> <answer>3+5</answer>"
        log.samples(step, group(text, "correct" if step > 3 else "wrong"), REWARDS)
        if step == 0:
            log.evaluation_samples(0, [group("<answer>3-5</answer>", "wrong")], REWARDS)
    log.evaluation_samples(6, [group("<answer>5+3</answer>")], REWARDS)
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
    assert all(read_lines(run_dir / name) == [] for name in FILES)


def test_a_line_cut_short_by_a_kill_is_dropped_before_the_next_is_written(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert len(read_lines(run_dir / "metrics.jsonl")) == 6
    RunLog(run_dir).metrics(step_line(6))
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == list(range(7))


def test_long_completions_keep_their_start_and_end(tmp_path):
    RunLog(tmp_path).samples(0, group("start " + "x" * 20_000 + " end"), REWARDS)
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
        UsageError, match=r"wandb is named in the config but not installed; in the repository"
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
        self.tags, self.attributes, self.fetched, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_shows_everything_asked_for(run_dir):
    page = Page()
    html = write_report(run_dir).read_text()
    page.feed(html)
    assert page.fetched == [] and "@import" not in html and "script" not in page.tags
    assert all(link.startswith("(#") for link in re.findall(r"url(\([^)]*\))", html))
    assert "prefers-color-scheme:dark" in html and "default-src 'none'" in html
    assert page.tags.count("svg") == 7
    text = " ".join(page.text)
    for part in ("25.0 %", "75.0 %", "pass@1 and cons@k", "Reward", "Completion length", "KL to the reference",
                 "Entropy", "Engine against trainer", "Time of a step", "Before: step 0", "After: step 6",
                 "Start: step 0", "Middle: step 3", "End: step 5", "Make 8 from 3, 5.", "target", "task", "equals 8",
                 ):  # fmt: skip
        assert part in text, part


def test_a_run_on_gpus_shows_its_memory_beside_the_plan(run_dir):
    RunLog(run_dir).metrics({**step_line(6), "memory_planned_bytes": 4e10, "memory_device_bytes": 3.8e10})
    html = write_report(run_dir).read_text()
    assert "GPU memory" in html and "held of it" in html and ">engine<" not in html


def test_a_run_without_evaluation_or_samples_still_has_a_page(tmp_path):
    RunLog(tmp_path).metrics({"step": 0, "reward_mean": 0.5})
    html = write_report(tmp_path).read_text()
    assert html.count("<svg") == 1 and summary(tmp_path)["pass_at_1_before"] is None


def test_a_fine_tuning_shows_its_losses_and_no_empty_plot(tmp_path):
    log = RunLog(tmp_path)
    for step in range(3):
        line = {"loss": 2.0 - step, "grad_norm": 1.0, "lr": 1e-4, "tokens_per_s": 9.0, "time_step_s": 1}
        log.metrics({"step": step, **line})
    log.evaluation({"step": 0, "loss": 2.5})
    log.evaluation({"step": 3, "loss": 0.5})
    html = write_report(tmp_path).read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert [title.split(",")[0] for title in titles] == [
        "Held-out loss", "Loss", "Gradient norm", "Learning rate", "Tokens per second", "Time of a step",
    ]  # fmt: skip
    assert "Held-out loss: <b>2.5</b> before, <b>0.5</b> after" in html


HOSTILE = "</pre></style></svg>'\"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}$x$\ud800\x00"


def test_no_field_of_any_file_can_become_part_of_the_page(tmp_path):
    """Strings where numbers belong, names of metrics, rewards and columns, texts, the config and its damage."""
    folder = tmp_path / "run"
    log = RunLog(folder)
    log.samples(0, group(HOSTILE), REWARDS)
    score = {"reward": HOSTILE, "value": HOSTILE, "verdict": HOSTILE, "detail": HOSTILE}
    completion = {"text": HOSTILE, "tokens": HOSTILE, "reward": HOSTILE, "verdict": HOSTILE, "scores": [score, 7, None]}
    prompt = [{"role": HOSTILE}, HOSTILE]
    question = {"step": 1, "prompt": prompt, "row": {HOSTILE: HOSTILE}, "completions": [completion]}
    numbers = {"pass_at_1": HOSTILE, "n": HOSTILE, "gap": [HOSTILE], "huge": 10**400, "time_x_s": HOSTILE}
    lines = {
        "samples.jsonl": [question, {"step": 2, "completions": HOSTILE}],
        "eval_samples.jsonl": [question],
        "metrics.jsonl": [{"step": 0, f"reward/{HOSTILE}": 1.0, "reward/b": 0.5, **numbers}, {"step": HOSTILE}, [], 3],
        "evals.jsonl": [{"step": 0, "pass_at_1": 0.5, HOSTILE: 1}, {"step": 1, **numbers}],
    }
    for name, values in lines.items():
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)
            file.write('{"step": 5, "cut')
    (folder / "config.yaml").write_text("name: " + json.dumps(HOSTILE[:-2]) + "\nseed: [" + "'<script>'" + "]\n")
    html = write_report(folder).read_text()
    page = Page()
    page.feed(html)
    assert not {"script", "img", "iframe", "link"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    text = "".join(page.text)
    assert "{{ 7*7 }}" in text and "<script>alert(1)</script>" in text
    assert "metrics.jsonl: 4 lines could not be read" in text
    assert json.loads((folder / "summary.json").read_text())["pass_at_1_after"] is None


@pytest.mark.parametrize("text", ["", "null", "- a", "a: [", "\xff\xfe", "name: !!python/object/apply:os.system [id]"])
def test_a_damaged_config_leaves_the_report_whole(run_dir, text):
    (run_dir / "config.yaml").write_bytes(text.encode("latin-1"))
    assert "While it learned" in write_report(run_dir).read_text()
    assert summary(run_dir)["name"] == "demo"


# --- plots ---


def curves(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every curve that is drawn, in the SVG's coordinates, y upwards."""
    paths = ElementTree.fromstring(svg).iter(f"{SVG}path")
    paths = [path for path in paths if "fill: none; stroke: var(--s" in path.get("style", "")]
    return [[(float(x), -float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))] for path in paths]


def test_a_line_goes_through_its_values_and_a_missing_one_leaves_a_gap():
    svg = line_chart([Series("a", [0, 1, 2, 3, 4], [1.0, 3.0, None, 2.0, 5.0])])
    (points,) = curves(svg)
    (x0, y0), (x3, y3) = points[0], points[3]  # undo the scale from two points, then compare the others
    assert [(x - x0) / (x3 - x0) * 4 for x, _ in points] == pytest.approx([0, 1, 3, 4], abs=0.02)
    assert [1 + (y - y0) / (y3 - y0) * 4 for _, y in points] == pytest.approx([1.0, 3.0, 2.0, 5.0], abs=0.02)
    assert len(re.findall("M ", next(p for p in svg.split("<path ") if "stroke: var(--s0)" in p))) == 2


def test_stacked_parts_are_as_high_as_their_sums():
    svg = ElementTree.fromstring(stacked([0, 1], {"a": [1.0, 2.0], "b": [3.0, None]}))
    filled = [e.get("d") for e in svg.iter(f"{SVG}path") if e.get("style", "").startswith("fill: var(--s")]
    heights = [sorted({float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", d)}) for d in filled]
    (top_1, low, base), (high, top_2, *_) = heights[0], heights[1]
    assert (base - low) * 2 == pytest.approx(base - top_1, abs=0.02)  # a: 1, then 2
    assert base - high == pytest.approx(4 * (base - low), abs=0.02)  # a and b: 4
    assert top_2 == pytest.approx(top_1, abs=0.02)  # b is missing: what is there of it is flat


def test_the_running_mean_is_centred_and_leaves_gaps():
    assert running_mean([1.0, 2.0, None, 4.0], 3) == [1.5, 1.5, None, 4.0]


def test_the_readme_curve_is_one_well_formed_picture(run_dir, tmp_path):
    path = curve_svg(run_dir, tmp_path / "docs" / "curve.svg")
    svg = ElementTree.parse(path).getroot()
    text = "".join(svg.itertext())
    assert "pass@1" in text and "countdown_reward" in text and "reward_mean" not in text
    marks = [e for e in svg.iter(f"{SVG}use") if "fill: var(--s" in e.get("style", "")]
    assert len(marks) == 6  # two of each figure, and one in its legend


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
