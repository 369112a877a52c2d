"""A config is complete, immutable and checked; every mistake is in one error."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlzero.config.read import ConfigError, known_names
from rlzero.config.rl import NOT_CONFIGURED, Config

MINIMAL = """
policy: {path: ./base}
data: {train: countdown}
rewards: [{fn: "rlzero.examples.countdown:countdown_reward"}]
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        Config.load(path, overrides)
    return error.value.problems


def test_defaults_are_the_published_values_of_r1_zero(write):
    config = Config.load(write(MINIMAL))
    assert config.optimizer.lr == 3e-6 and config.loss.kl_coef == 1e-3 and config.loss.clip_high == 10
    assert config.batch.group_size == 16 and config.rollout.temperature == 1.0 and config.rollout.max_tokens == 32_768
    # 8,192 outputs a rollout in 16 minibatches; 10,400 updates; the reference changes every 400 updates.
    assert config.batch.prompts * config.batch.group_size == 8192 and config.batch.minibatches == 16
    assert config.steps * config.batch.minibatches == 10_400
    assert config.algorithm.reference_refresh_steps * config.batch.minibatches == 400
    assert config.algorithm.advantage == "grpo" and config.data.template == "r1-zero"
    assert (config.evaluation.samples, config.evaluation.temperature, config.evaluation.top_p) == (64, 0.6, 0.95)


def test_a_config_has_at_most_80_fields():
    names = known_names(Config)
    leaves = [name for name in names if not any(other.startswith(name + ".") for other in names)]
    leaves = [name for name in leaves if name not in NOT_CONFIGURED]
    assert len(leaves) <= 80, leaves


def test_overrides_reach_nested_fields_lists_and_numbers_in_scientific_notation(write):
    config = Config.load(
        write(MINIMAL),
        ["optimizer.lr=1e-6", "rewards.0.weight=0.5", "rollout.stop=['</answer>']", "data.params.count=7"],
    )
    assert config.optimizer.lr == 1e-6 and config.rewards[0].weight == 0.5
    assert config.rollout.stop == ("</answer>",) and config.data.params == {"count": 7}


def test_the_resolved_config_reads_back_as_an_equal_one(write, tmp_path):
    config = Config.load(write(MINIMAL), ["steps=7", "optimizer.schedule=cosine", "batch.minibatches=4"])
    again = tmp_path / "resolved.yaml"
    again.write_text(config.resolved_yaml())
    assert Config.load(again) == config


def test_the_schedule_ends_with_the_run(write):
    config = Config.load(write(MINIMAL), ["steps=7", "optimizer.schedule=cosine", "batch.minibatches=4"])
    assert config.optimizer.total_steps == 28


def test_every_mistake_is_listed_with_the_nearest_known_name(write):
    path = write(
        """
stepz: 10
temperature: 2
policy: {path: ./base, dtyp: float32, recipe: fp16}
data: {train: countdown}
rewards: [{fn: a:b, wieght: 1}]
batch: {prompts: 5, group_size: 16, minibatches: 3, foo: 1}
optimizer: {lr: fast}
"""
    )
    found = problems(path, "rollout.workers=-1", "nonsense")
    expected = [
        ("stepz", "did you mean steps?"),
        ("temperature", "did you mean rollout.temperature?"),
        ("policy.dtyp:", "did you mean policy.dtype?"),
        ("policy.recipe", "bf16, fp8, fp8_emulated"),
        ("rewards.0.wieght", "did you mean rewards.0.weight?"),
        ("batch.foo", "known in batch: prompts, group_size, minibatches, tokens_per_micro_batch"),
        ("optimizer.lr", "found 'fast'"),
        ("rollout.workers", "found -1"),
        ("override 'nonsense'", "section.key=value"),
        ("batch: 5 prompts x 16 completions = 80", "3 equal minibatches"),
    ]
    for start, part in expected:
        assert any(line.startswith(start) and part in line for line in found), (start, part, found)
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.prompts=10", "batch.group_size=3"], "cannot be split into 16 equal minibatches"),
        (["batch.group_size=1"], "use at least 2"),
        (["batch.tokens_per_micro_batch=1000"], "cannot hold one sample"),
        (["rollout.top_p=0.9"], "only evaluation.top_p"),
        (["rollout.top_k=5"], "only evaluation.top_p"),
        (["rollout.temperature=0"], "greater than 0"),
        (["evaluation.every=5"], "data.evaluation names no held-out questions"),
        (["evaluation.temperature=0"], "are all the same"),
        (["algorithm.overlong=[40000, 1.0]"], "smaller than rollout.max_tokens"),
        (["device=cpu", "policy.recipe=fp8"], "fp8_emulated"),
        (["policy.init={vocab_size: 4}", "policy.path=null"], "starts from a trained model"),
        (["rollout.oversample=1.5"], "set loss.correction=tis"),
        (["rollout.oversample=3"], "less than or equal to 2"),
        (["optimizer.total_steps=3"], "follows from steps and batch.minibatches"),
        (["optimizer.schedule=linear", "optimizer.warmup_steps=32", "steps=2"], "leave none of the run's 32"),
        (["staleness=1"], "set loss.correction=tis (or icepop), or staleness=0"),
        (["loss.correction_bounds=[0, 3]"], "loss.correction is none; set it to tis or icepop"),
        (["loss.correction_level=sequence"], "loss.correction is none; set it to tis or icepop"),
        (["loss.teacher_coef=0.5"], "has no teacher"),
        (["batch.group_size=1", "algorithm.advantage=reinforce_pp", "algorithm.max_refills=2"], "refilled for ever"),
        (["loss.constant_length=7", "loss.aggregation=constant"], "follows from rollout.max_tokens"),
        (["name=a/b"], "should match pattern"),
    ],
)
def test_contradictions_between_fields_are_errors(write, overrides, message):
    (found,) = problems(write(MINIMAL), *overrides)
    assert message in found


def test_a_warm_up_longer_than_the_run_is_no_matter_where_nothing_follows_it(write):
    config = Config.load(write(MINIMAL), ["steps=2", "optimizer.warmup_steps=320"])
    assert config.optimizer.total_steps == 32


def test_stale_completions_with_a_correction_are_fine(write):
    assert Config.load(write(MINIMAL), ["staleness=1", "loss.correction=icepop"]).staleness == 1


def test_a_sample_longer_than_the_policys_context_is_an_error(write, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    found = problems(write(MINIMAL), f"policy.path={tmp_path}", "data.max_prompt_tokens=100", "rollout.max_tokens=413")
    assert "= 513 is longer than the policy's context of 512 tokens" in found[0]
    Config.load(write(MINIMAL), [f"policy.path={tmp_path}", "data.max_prompt_tokens=100", "rollout.max_tokens=412"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "run.yaml:1"),
        ("steps: 1\nsteps: 2\n", "the key 'steps' is given twice"),
        ("{[a]: 1}", "['a'] cannot be a key"),
        ("- a\n", "expected `key: value` lines, found a list"),
        ("", "policy: missing"),
    ],
)
def test_text_that_is_no_config_is_an_error(write, text, message):
    with pytest.raises(ConfigError, match=".*") as error:
        Config.load(write(text))
    assert message in str(error.value)


def test_a_missing_file_is_an_error(tmp_path):
    assert problems(tmp_path / "none.yaml") == ["cannot be read: No such file or directory"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="ab.=[]{}:,0-e'\"\n ", max_size=30))
def test_any_override_is_either_taken_or_reported(tmp_path, override):
    """No other exception than ConfigError leaves the reader, whatever is typed."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    try:
        Config.load(path, [override])
    except ConfigError as error:
        assert error.problems


def test_home_and_variables_are_expanded_in_places_alone(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MODELS", "/models")
    config = Config.load(
        write(MINIMAL), ["policy.path=$MODELS/base", "output_dir=~/runs", "rewards.0.fn='${MODELS}/r.py:f'", "name=x"]
    )
    assert (config.policy.path, config.output_dir, config.rewards[0].fn) == (
        "/models/base", "/home/me/runs", "/models/r.py:f",
    )  # fmt: skip
    assert Config.load(write(MINIMAL), ["data.suffix='$MODELS ~'"]).data.suffix == "$MODELS ~"


def test_addresses_and_variables_that_are_not_set_are_mistakes(write, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    changes = ["policy.path=hf://Qwen/Qwen2.5-0.5B", "output_dir=hf://me/runs", "data.train=$NOWHERE/x"]
    found = problems(write(MINIMAL), *changes)
    assert [line.split(":")[0] for line in found] == ["output_dir", "policy.path", "data.train"]
    assert "$NOWHERE is not set in the environment" in found[2] and "expected a folder of this machine" in found[0]
