"""The judge client against a real model behind vLLM's own server. Slow: the server needs a minute to start.

Set RLZERO_JUDGE_MODEL to a folder with a small instruct model (docs/rewards.md says which and where from).
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rewards.judge import Judge, JudgeError, pairwise_reward, rubric_reward

MODEL = os.environ.get("RLZERO_JUDGE_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(MODEL).is_dir() or not MODEL, reason="RLZERO_JUDGE_MODEL names no model folder"),
]


@pytest.fixture(scope="module")
def url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        MODEL,
        "--served-model-name",
        "judge",
    ]
    command += ["--port", str(port), "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 400
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
            break
        except OSError:
            assert server.poll() is None, "the server ended before it was up"
            assert time.monotonic() < deadline, "the server was not up in 400 s"
            time.sleep(1)
    yield f"http://127.0.0.1:{port}/v1"
    os.killpg(server.pid, 15)
    server.wait(60)


def test_a_served_model_answers_and_its_tokens_are_counted(url):
    judge = Judge(url, "judge", max_tokens=16, prompt_price=1.0, completion_price=1.0)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    first, again = judge.ask_now(messages), judge.ask_now(messages)
    assert "paris" in first.text.lower() and again.text == first.text
    assert judge.usage.requests == 1 and judge.usage.cached == 1
    assert judge.usage.prompt_tokens > 10 and judge.usage.cost == pytest.approx(
        (judge.usage.prompt_tokens + judge.usage.completion_tokens) / 1e6
    )


def test_a_rubric_gives_points_on_the_scale(url):
    """By schema, because a model of this size rarely keeps to a form that it is only asked for."""
    for question, answer in (("What is 2+2?", "4"), ("Name a colour.", "Blue.")):
        score = asyncio.run(rubric_reward(f"</think>{answer}", question, url, "judge", max_tokens=200, structured=True))
        assert 0 <= score.value <= 1 and score.metrics["judge_completion_tokens"] > 0


def test_a_comparison_gives_a_share_of_two_orders(url):
    score = asyncio.run(
        pairwise_reward(
            "</think>Paris.", "Capital of France?", "Bananas.", url, "judge", max_tokens=200, structured=True
        )
    )
    assert score.value in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_without_a_verdict_there_is_an_error_and_no_score(url):
    with pytest.raises(JudgeError, match="no verdict in 2 replies"):
        asyncio.run(rubric_reward("</think>4", "What is 2+2?", url, "judge", max_tokens=2, attempts=2))
