"""The reward runner as a Ray actor: the same class, the same answers."""

import pytest
import ray

from rewards.workers.runner import RewardRunner

SPECS = [{"fn": "rlzero.examples.countdown:countdown_reward"}, {"fn": "rewards.format:format_reward"}]
ROW = {"numbers": [3, 5, 8], "target": 16}
RIGHT = "<think>3+5=8</think> <answer>3+5+8</answer>"
WRONG = "<think>3+5=8</think> <answer>8*5</answer>"


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_actors_score_as_local_processes_do(cluster):
    actors = [ray.remote(num_cpus=1)(RewardRunner).remote(SPECS, workers=1) for _ in range(2)]
    try:
        for i, actor in enumerate(actors):
            ray.get(actor.submit.remote(f"group {i}", [RIGHT, WRONG], ROW))
        scored = dict(entry for actor in actors for entry in ray.get(actor.completed.remote(timeout_s=60)))
    finally:
        ray.get([actor.close.remote() for actor in actors])
    with RewardRunner(SPECS, workers=1) as local:
        expected = local.score([RIGHT, WRONG], ROW)
    assert [[score.value for score in row] for row in expected] == [[1.0, 0.0], [1.0, 1.0]]
    assert scored == {"group 0": expected, "group 1": expected}
