"""`rlzero eval`: questions answered by the rollout workers of a run without its trainer, or by a served model."""

from __future__ import annotations

import asyncio
import importlib.metadata
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rewards.workers.runner import RewardRunner
from rlzero.cluster.engines import EnginePool
from rlzero.cluster.ray_cluster import Cluster
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.data import dump
from rlzero.data.prompts import load_prompts, load_tokenizer, prompt_text
from rlzero.eval import ask, evaluate
from rlzero.eval.store import Store
from rlzero.eval.tasks import task as tasks
from rlzero.rl.groups import Group
from rlzero.rl.rollouts import Writer
from rlzero.rl.run import engine, engine_options
from rollout.engine import Sampling
from trainer.checkpoint.model_folder import model_fields, position_limit

Say = Callable[[str], None]


def run(config: Config, output: Path | None = None, say: Say = lambda line: None) -> list[Group]:
    """The scored groups of the held-out questions, answered by `policy.path`; see `evaluate.summarise` for figures.

    Questions, sampling and noise are those of an evaluation inside a run: of a run's checkpoint the figures are the
    ones that the run wrote. `rollout.workers` engines share the questions out, each on GPUs of its own where there are
    any. `output` gets every completion with its scores, a question as soon as it is scored. Raises `UsageError` and
    `ClusterError`.
    """
    prompts = list(load_prompts(config, load_tokenizer(config.policy.path), "evaluation"))

    async def answer(pool: EnginePool) -> list[Group]:
        written = nullcontext()
        if output is not None:
            written = dump.writing(output, config.rewards, policy=config.policy.path)
        rewards = RewardRunner(
            config.rewards, workers=config.reward_workers, max_error_share=config.max_reward_error_rate
        )
        with written as write, rewards:
            writer = Writer(pool, rewards, scored=write)
            try:
                tag = evaluate.tag(_steps_of(Path(config.policy.path)))
                return await writer.all(tag, prompts, config.evaluation.samples, evaluate.sampling(config))
            finally:
                writer.close()

    return _with_engines(config, answer, say)


def _with_engines(config: Config, work: Callable[[EnginePool], Any], say: Say) -> Any:
    """What `work(pool)` returns, with the engines of `config` running meanwhile."""
    kind, reason = engine(config)
    say(f"engine: {kind} ({reason})")

    async def inside() -> Any:
        with Cluster(config, trainer=False) as cluster:
            pool = EnginePool(cluster, kind, str(config.policy.path), engine_options(config, kind, {}))
            await pool.ready()
            return await work(pool)

    return asyncio.run(inside())


def _steps_of(folder: Path) -> int:
    """Steps that a run's checkpoint has behind it; 0 of any other model."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else 0


# ---- benchmarks ----


@dataclass(frozen=True)
class Ask:
    """What is asked of a model. `source` is a policy's folder or the YAML of a run; with `endpoint` the name of a model
    there. None takes what the config says: `n` samples, `temperature`, `top_p`; 0.6 and 0.95 are R1's."""

    source: str
    tasks: Sequence[str]
    store: Path
    data: Path = Path("data")
    n: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32_768
    limit: int | None = None
    template: str = "auto"
    endpoint: str | None = None
    api_key: str = "none"


def benchmarks(asked: Ask, overrides: Sequence[str], say: Say, counting: Callable) -> None:
    """Answers to all that `asked` names, into its store; what is there already is not asked again. `counting(title)`
    makes a progress bar. Raises `UsageError` before anything starts where a task, its rows or the model's template
    cannot be used."""
    if asked.n > 1 and asked.temperature == 0:
        raise UsageError(f"--n {asked.n}: samples at temperature 0 are all the same; use --n 1 or more temperature")
    chosen = [tasks.find(spec) for spec in asked.tasks]
    questions = {task.name: task.questions(source, asked.data, asked.limit) for task, source in chosen}
    if len(questions) < len(chosen):
        raise UsageError("--tasks: one task twice; evaluate its sources into two stores")
    if asked.endpoint is not None:
        sampling = Sampling(asked.max_tokens, asked.temperature, asked.top_p)
        store = _store(asked, questions, chosen, {"sampling": _words(sampling), "template": "endpoint"})
        model = ask.Endpoint(asked.endpoint, asked.source, sampling, asked.api_key)
        asyncio.run(_all(asked, chosen, questions, model, store, 2, counting))
        return
    config, template = _config(asked, overrides)
    tokenizer = load_tokenizer(config.policy.path)
    tokens, longest = _prompts(questions, template, tokenizer, say)
    limit, context = config.rollout.max_tokens, position_limit(model_fields(config.policy.path))
    if context is not None and longest + limit > context:
        if longest >= context:
            raise UsageError(f"the longest question has {longest} tokens and the model's context {context}")
        say(f"completions: up to {context - longest} tokens (a context of {context}, the longest question {longest})")
        limit = context - longest
    sampling = Sampling(limit, asked.temperature, asked.top_p, stop=config.rollout.stop)
    store = _store(asked, questions, chosen, {"sampling": _words(sampling), "template": template})

    async def answer(pool: EnginePool) -> None:
        model = ask.EngineModel(pool, tokens.__getitem__, sampling)
        await _all(asked, chosen, questions, model, store, config.reward_workers, counting)

    if any((t, q.id, i) not in store.done for t, every in questions.items() for q in every for i in range(asked.n)):
        _with_engines(config, answer, say)


async def _all(asked: Ask, chosen, questions, model: ask.Model, store: Store, workers: int, counting) -> None:
    try:
        for task, _ in chosen:
            with counting(task.name) as progress:
                await ask.ask(task, questions[task.name], asked.n, model, store, workers, progress)
    finally:
        store.close()


def _config(asked: Ask, overrides: Sequence[str]) -> tuple[Config, str]:
    """The run whose engines answer, and the template. A folder gets a config of its own, kept in the store."""
    path = Path(asked.source)
    if path.suffix in (".yaml", ".yml"):
        config = Config.load(path, overrides)
        return config, config.data.template if asked.template == "auto" else asked.template
    if not (path / "config.json").is_file():
        raise UsageError(f"{path}: neither a YAML file nor a folder with a model (no config.json in it)")
    tree = {
        "name": "eval",
        "output_dir": str(asked.store),
        "policy": {"path": str(path)},
        "data": {"train": asked.tasks[0], "max_prompt_tokens": 1},
        "rewards": [{"fn": tasks.find(asked.tasks[0])[0].reward}],
        "rollout": {"max_tokens": 1},
        "batch": {"tokens_per_micro_batch": 2048},
    }
    asked.store.mkdir(parents=True, exist_ok=True)
    file = asked.store / "config.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    config = Config.load(file, overrides)
    rollout = config.rollout.model_copy(update={"max_tokens": asked.max_tokens})
    template = asked.template
    if template == "auto":
        template = "chat" if load_tokenizer(path).chat_template else "r1-zero"
    return config.model_copy(update={"rollout": rollout}), template


def _prompts(questions, template: str, tokenizer: Any, say: Say) -> tuple[dict[str, tuple[int, ...]], int]:
    """Tokens of every question's text, and the most of one. Says what is odd about template and tokenizer."""
    found: dict[str, tuple[int, ...]] = {}
    for name, every in questions.items():
        for question in every:
            text = prompt_text(question.prompt, template, tokenizer, f"{name} {question.id}")
            found[question.prompt] = tuple(tokenizer.encode(text, add_special_tokens=template != "chat"))
    first = next(iter(found.values()))
    bos = tokenizer.bos_token_id
    if bos is not None and first[:2] == (bos, bos):
        raise UsageError(f"template {template}: every question would begin with {tokenizer.bos_token!r} twice")
    ends = tokenizer.decode(first).rstrip()
    say(f"template: {template}; a question ends with {ends[-40:]!r}")
    if ends.endswith("<think>"):
        say("template: opens <think> itself, so completions hold only its end; checkers read that")
    return found, max(map(len, found.values()))


def _store(asked: Ask, questions, chosen, more: dict[str, Any]) -> Store:
    meta = {
        "model": asked.source,
        "endpoint": asked.endpoint,
        "samples": asked.n,
        **more,
        "tasks": {t.name: {"source": source, "reward": t.reward, "votes": t.votes} for t, source in chosen},
        "code": f"rlzero {importlib.metadata.version('rlzero')}",
        "date": time.strftime("%Y-%m-%d"),
    }
    return Store(asked.store, meta, questions)


def _words(sampling: Sampling) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
