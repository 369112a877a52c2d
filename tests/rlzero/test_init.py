"""`rlzero init`: every shipped config can be written anywhere; those that need no download are ready to run."""

import pytest

from rlzero.config import init as configs
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.data.prompts import load_prompts, load_tokenizer
from rlzero.launch import check_rewards


def test_every_shipped_config_is_listed_with_what_it_is_and_written(tmp_path):
    listed = configs.shipped()
    assert {"demo", "gsm8k-0.5b", "own-reward", "r1-zero"} <= set(listed)
    for name, about in listed.items():
        assert 10 < len(about) <= 100 and configs.init(name, tmp_path / name)[0].is_file()


@pytest.mark.parametrize("name", ["demo", "own-reward"])
def test_a_config_for_the_shipped_base_finds_model_rows_and_reward_from_any_folder(tmp_path, monkeypatch, name):
    path, *_ = configs.init(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    config = Config.load(path)
    check_rewards(config)
    assert len(load_prompts(config, load_tokenizer(config.policy.path), "train")) >= config.batch.prompts


def test_nothing_is_overwritten_and_an_unknown_name_lists_the_known(tmp_path):
    configs.init("own-reward", tmp_path)
    with pytest.raises(UsageError, match="exists; go to another folder"):
        configs.init("own-reward", tmp_path)
    with pytest.raises(UsageError, match="no config 'gsm' is shipped; there are\n(.|\n)*gsm8k-0.5b"):
        configs.init("gsm", tmp_path)
