"""The command `rlzero`. Every heavy import stands inside the command that needs it: `rlzero --help` is instant.

Exit codes: 0 done, 1 the run failed, 2 what was asked for is wrong (a config, a file, an argument), 130, 143 and
129 interrupted by Ctrl-C, SIGTERM and SIGHUP.
Errors are messages; RLZERO_TRACEBACK=1 shows where they came from.
"""

from __future__ import annotations

import errno
import locale
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlzero import interrupt

app = typer.Typer(
    name="rlzero",
    help="Turns a base model into a reasoner with reinforcement learning, the R1-Zero way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="changes to it, for example steps=20 optimizer.lr=1e-6", metavar="A.B=C", show_default=False),
]


Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the run's newest checkpoint, if it has one; `--resume last-good`: from the newest undamaged.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"rlzero {version('rlzero')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Turns a base model into a reasoner with reinforcement learning, the R1-Zero way."""


@app.command()
def init(
    name: Annotated[str | None, typer.Argument(help="one of the shipped configs; none lists them")] = None,
    folder: Annotated[Path, typer.Option(help="Where to write it.")] = Path("."),
) -> None:
    """Write a ready config to start from: demo, gsm8k-0.5b, own-reward, the published runs."""
    from rlzero.config import init as configs

    if name is None:
        typer.echo("\n".join(f"{name:<16} {about}" for name, about in configs.shipped().items()))
        return
    config, *others = configs.init(name, folder)
    typer.echo("".join(f"{path}\n" for path in (config, *others)) + "Its first lines say what it needs; then:")
    text = config.read_text(encoding="utf-8")
    command = "train" if "\nrewards:" in text else "sft" if "\nepochs:" in text else "plan"
    there = "" if folder == Path(".") else f"cd {folder} && "
    typer.echo(f"  {there}rlzero {command} {config.name}" + (" --dry-run" if command != "plan" else ""))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved run, its placement and memory; check that the cluster can hold it."
        ),
    ] = False,
    resume: Resume = False,
    from_dump: Annotated[
        Path | None, typer.Option(help="Only train: one step on what `rlzero generate --dump` saved.")
    ] = None,
) -> None:
    """Run reinforcement learning as CONFIG describes it."""
    from rlzero.config.rl import Config

    resume, changes = _last_good(resume, overrides)
    settings = Config.load(config, changes)
    if dry_run:
        from rlzero import launch

        launch.check(settings)
        _show_plan(settings, resolved=True)
        return
    from rlzero import launch

    if from_dump is not None:
        for name, value in sorted(launch.train_from_dump(settings, from_dump, resume).items()):
            typer.echo(f"{name:<28} {value:.6g}")
        return
    launch.train(settings, resume)
    _show_report(settings.run_dir)


@app.command()
def generate(
    config: ConfigFile,
    overrides: Overrides = None,
    dump: Annotated[
        Path, typer.Option(help="JSON-lines file to write the scored groups to.", show_default=False)
    ] = ...,
    resume: Annotated[bool, typer.Option("--resume", help="With the weights of the run's newest checkpoint.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="How many steps of prompts.")] = 1,
) -> None:
    """Only write and score the completions of coming steps, without training."""
    from rlzero import launch
    from rlzero.config.rl import Config

    settings = Config.load(config, overrides or [])
    groups = launch.generate(settings, dump, resume, steps)
    typer.echo(f"{len(groups)} groups, {sum(len(g.rollouts) for g in groups)} completions -> {dump}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="YAML of a run, a model's folder, its name at --endpoint; or `show`, then stores to show",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks, name or name:source, by commas; none: the config's own questions.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Samples a question.")] = 1,
    data: Annotated[Path, typer.Option(help="Folder with the benchmarks' files.")] = Path("data"),
    store: Annotated[Path | None, typer.Option(help="Folder for the outcomes; evals/MODEL if not given.")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a completion.")] = 32_768,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    template: Annotated[str, typer.Option(help="auto, chat, r1-zero or none.")] = "auto",
    endpoint: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server that has the model.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A model, checkpoint or run to evaluate instead of policy.path.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON-lines file for the completions of the config's own questions.")
    ] = None,
    plan: Annotated[
        float | None, typer.Option(help="With show: how many questions a difference of this size needs.")
    ] = None,
) -> None:
    """pass@1, pass@k and cons@k with intervals: of benchmarks (--tasks), or of a config's own held-out questions.

    `rlzero eval show STORE [STORE ...]` computes the figures anew; of several stores it tests each against the first.
    """
    from rlzero.config.read import UsageError
    from rlzero.stages.export import find_checkpoint

    changes = list(overrides or [])
    if model == "show":
        _show_stores([Path(name) for name in changes], plan)
        return
    if policy is not None:
        changes.append(f"policy.path={find_checkpoint(policy)}")
    if tasks is None:
        _own_questions(Path(model), changes, output)
        return
    if template not in ("auto", "chat", "r1-zero", "none"):
        raise UsageError(f"--template {template}: expected auto, chat, r1-zero or none")
    from rlzero.eval import run
    from rlzero.report.display import counting

    if endpoint is None and not model.endswith((".yaml", ".yml")):
        model = str(find_checkpoint(Path(model)))
    folder = store or Path("evals") / Path(model).name
    asked = run.Ask(
        model, tuple(tasks.split(",")), folder, data, n, temperature, top_p, max_tokens, limit, template, endpoint,
        os.environ.get("OPENAI_API_KEY", "none"),
    )  # fmt: skip
    run.benchmarks(asked, changes, typer.echo, counting)
    _show_stores([folder], None)


def _own_questions(config: Path, changes: list[str], output: Path | None) -> None:
    from rlzero import launch
    from rlzero.config.rl import Config
    from rlzero.eval import run
    from rlzero.eval.evaluate import summarise
    from rlzero.rl.diagnosis import diagnose

    settings = Config.load(config, changes)
    launch.check_rewards(settings)
    groups = run.run(settings, output, say=typer.echo)
    if (why := diagnose(groups, settings, training=False)) is not None:
        typer.echo(why, err=True)
    for name, value in summarise(groups, settings.rewards).items():
        typer.echo(f"{name:<18} {value:.4g}")


def _show_stores(stores: list[Path], plan: float | None) -> None:
    from rlzero.config.read import UsageError
    from rlzero.eval import words
    from rlzero.eval.store import load

    found = [load(folder) for folder in stores]
    for each in found:
        typer.echo("\n".join([*words.describe(each), ""]))
    try:
        for other in found[1:]:
            typer.echo("\n".join(words.describe_comparison(found[0], other)))
            if plan is not None:
                typer.echo("\n".join(words.describe_plan(found[0], other, plan)))
    except ValueError as error:
        raise UsageError(str(error)) from error


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="JSON lines, one completion each", show_default=False)],
    reward: Annotated[
        list[str],
        typer.Option(
            help="package.module:function, ./file.py:function, or as in a config: '{fn: ./file.py:function, timeout_s: "
            "60, params: {limit: 3}}'; may be given several times."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="JSON-lines file for every completion's verdicts.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores if not given.")] = None,
    completion: Annotated[str, typer.Option(help="Column of the completion.")] = "completion",
    label: Annotated[str, typer.Option(help="Column that says whether it is right, for a confusion table.")] = "label",
    group: Annotated[
        str | None, typer.Option(help="Column whose equal values make a group: samples that rewards compare.")
    ] = None,
    explain: Annotated[
        int | None, typer.Option(help="Only this line, with what was extracted and which rule decided.")
    ] = None,
) -> None:
    """Try rewards on a file of completions or a dump, without a model; exit code 1 where a reward always fails."""
    import yaml

    from rewards.load import RewardError
    from rewards.score_file import explain as explain_line
    from rewards.score_file import score_file
    from rlzero.config.read import UsageError
    from rlzero.report.display import counting

    try:
        rewards = [yaml.safe_load(entry) if entry.lstrip().startswith("{") else entry for entry in reward]
        if explain is not None:
            for entry in rewards:
                typer.echo(explain_line(file, entry, explain, completion))
            return
        columns = {"completion": completion, "label": label, "group": group}
        with counting("scoring") as progress:
            result = score_file(file, rewards, output, workers=workers, progress=progress, **columns)
    except (RewardError, yaml.YAMLError) as error:
        raise UsageError(str(error)) from error
    typer.echo(str(result))
    if result.failed:
        raise typer.Exit(1)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Memory, placement and work of a run or of an architecture, without starting anything."""
    from rlzero.config.rl import Config
    from rlzero.plan import of_architecture

    if of_architecture.is_model_config(config):
        lines, short = of_architecture.plan_text(config, overrides or [])
        typer.echo("\n".join(lines))
        if short is not None:
            raise short
        return
    _show_plan(Config.load(config, overrides or []), resolved=False)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run, for example runs/demo", show_default=False)],
) -> None:
    """Write report.html and summary.json of a run."""
    _show_report(run_dir)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a run, a checkpoint or a model folder", show_default=False)],
    target: Annotated[Path, typer.Argument(help="new folder", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; as it is if not given")] = None,
    format: Annotated[str | None, typer.Option(help="bf16, or fp8 as in DeepSeek's release (128x128 blocks)")] = None,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder."""
    from rlzero.config.read import UsageError
    from rlzero.stages.export import export as write

    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype}: expected float32 or bfloat16")
    if format not in (None, "bf16", "fp8") or (dtype and format):
        raise UsageError(f"--format {format}: expected bf16 or fp8, and not beside --dtype")
    typer.echo(str(write(source, target, dtype, format)))


@app.command()
def pretrain(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make the demo's base model: pre-training on generated text."""
    from rlzero.examples.countdown import pretrain as stages

    settings = stages.BaseConfig.load(config, overrides or [])
    folder = stages.pretrain(settings, say=lambda line: typer.echo(_numbers(line)))
    typer.echo(str(folder))


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run and what its rows amount to.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Supervised fine-tuning on conversations, questions with answers, text, or a dump of `generate`."""
    from rlzero.config.sft import SftConfig
    from rlzero.report.display import counting

    resume, changes = _last_good(resume, overrides)
    settings = SftConfig.load(config, changes)
    from rlzero.stages import sft as stage

    if dry_run:
        typer.echo(settings.resolved_yaml())
        with counting("reading") as progress:
            prepared = stage.prepare(settings, progress)
        typer.echo("\n".join(prepared.describe()))
        return
    typer.echo(str(stage.train(settings, resume, typer.echo)))


def _last_good(resume: bool, overrides: list[str] | None) -> tuple[bool | str, list[str]]:
    """Takes the word last-good of `--resume last-good` out of what looks like changes to the config."""
    changes = list(overrides or [])
    if resume and "last-good" in changes:
        changes.remove("last-good")
        return "last-good", changes
    return resume, changes


def _numbers(line: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items() if "/" not in name)  # no single layers


def _show_plan(config, resolved: bool) -> None:
    from rlzero.cluster import placement
    from rlzero.cluster import ray_cluster as cluster
    from rlzero.config.read import UsageError
    from rlzero.plan.of_run import describe, make_plan, shortage

    if resolved:
        typer.echo(config.resolved_yaml())
    placed = placement.plan(config)
    found = make_plan(config)
    typer.echo("\n".join(describe(config, found, placed.lines(config.reward_workers))))
    if config.cluster.address is None:
        typer.echo(placed.threads_line(config.staleness > 0))
    if found is not None and (why := shortage(config, found)):
        raise UsageError(why)
    if resolved:
        import ray

        cluster.connect(config.cluster.address, placed.local_cpus)
        try:
            cluster.check_resources(placed)
        finally:
            ray.shutdown()
        typer.echo("cluster    can hold the run")


def _show_report(run_dir: Path) -> None:
    from rlzero.report.html import summary, write_report

    page = write_report(run_dir)
    figures = summary(run_dir)
    if figures["pass_at_1_before"] is not None and figures["pass_at_1_after"] is not None:
        typer.echo(f"pass@1 {figures['pass_at_1_before']:.1%} -> {figures['pass_at_1_after']:.1%}")
    typer.echo(f"report: {page}")


def main() -> None:
    """Entry point: runs the command and turns what it raises into a message and an exit code."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if locale.getencoding().lower().replace("-", "") != "utf8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # read when an interpreter starts: of this command, and of all that it starts
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    with interrupt.commands():
        try:
            app()
        except Exception as error:  # the last place to turn an error into a message
            if os.environ.get("RLZERO_TRACEBACK"):
                raise
            typer.echo(f"error: {_message(error)}", err=True)
            sys.exit(2 if _is_usage(error) else 1)


def _is_usage(error: Exception) -> bool:
    reading = sys.modules.get("rlzero.config.read")  # not loaded: then nothing of it can have been raised
    return reading is not None and isinstance(error, reading.UsageError)


def _message(error: Exception) -> str:
    """Our own errors speak for themselves; any other is named, with the way to its traceback."""
    ours = type(error).__module__.split(".")[0] in ("rlzero", "rewards", "rollout", "trainer")
    if ours and str(error):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}: what was written before is intact; free some space and go on with --resume"
    where = "; ".join([*getattr(error, "__notes__", []), "RLZERO_TRACEBACK=1 shows where it came from"])
    return f"{type(error).__name__}: {error}\n({where})"


if __name__ == "__main__":
    main()
