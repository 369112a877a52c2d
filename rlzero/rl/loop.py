"""The GRPO loop. Read it top to bottom: this is the whole system.

A step: take prompts, write completions, score them, drop or refill groups that teach nothing, turn rewards into
advantages, pack, train, hand the new weights to the engines; evaluate and save when due. With `staleness: n` the
completions of up to n further steps are written while a step trains; with 0 everything happens in turn. With
`rollout.oversample` above 1 more groups are opened than a step needs, and those not complete in time go on in the next.
"""

from __future__ import annotations

from rlzero.config.rl import Config
from rlzero.eval.evaluate import why_unscored
from rlzero.rl.groups import Graded, grade, to_samples
from rlzero.rl.run import Run
from trainer.packing import Sample, pack


async def train(run: Run) -> None:
    """Runs the steps that `run` has left. Its engines hold the trainer's weights and have shown that they agree with
    it; every step boundary can be saved and resumed."""
    config = run.config
    await run.evaluate(step=run.step)
    steps = run.ahead(lambda step: collect(run, step))  # graded groups, step by step, `staleness` steps ahead

    for step in range(run.step, config.steps):
        with run.clock("rollout"):
            graded = await anext(steps)
        samples = to_samples(graded, config.algorithm)
        with run.clock("train"):
            await run.make_room()
            metrics = await run.trainer.call("step", minibatches(samples, config))
        with run.clock("sync"):
            await run.publish(version=step + 1)
            await run.refresh_reference(step + 1)
        run.record(step, graded, metrics)
        await run.evaluate(step + 1)
        await run.save(step + 1)
        if run.stopping:
            break


async def collect(run: Run, step: int) -> Graded:
    """The groups that step `step` learns from: written by the policy, scored as soon as a group is complete.

    With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all equal are replaced by
    groups of further prompts, for at most `max_refills` waves.
    """
    config = run.config
    taken: Graded | None = None
    for wave in range(1 + config.algorithm.max_refills * config.algorithm.dynamic_sampling):
        missing = config.batch.prompts - (len(taken.groups) if taken else 0)
        groups = await run.write(f"{step}.{wave}", missing)
        graded = grade(groups, config.rewards, config.algorithm, config.rollout.max_tokens)
        run.count(step, graded)
        if wave == 0 and not graded.valid.any():
            raise run.error(f"step {step}: {why_unscored([s for g in groups for s in g.scores], config.rewards)}")
        if config.algorithm.dynamic_sampling:
            graded = graded.select(~graded.degenerate)
        taken = taken + graded if taken else graded
        if len(taken.groups) == config.batch.prompts:
            break
    if not taken.groups:
        raise run.error(f"step {step}: all groups of {wave + 1} waves had equal rewards; task too easy or too hard")
    return taken


def minibatches(samples: list[Sample], config: Config) -> list[list]:
    """The step's samples, in order, as `minibatches` lists of packed micro-batches: one optimizer step each."""
    size = -(-len(samples) // config.batch.minibatches)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    packed = [pack(part, config.batch.tokens_per_micro_batch, config.rollout.temperature) for part in parts]
    return [part for part in packed if part]
