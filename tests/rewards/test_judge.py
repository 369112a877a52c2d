"""The judge client against a real HTTP endpoint on this host: verdicts, retries, cache, costs, errors."""

import asyncio
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rewards.judge import Judge, JudgeError, pairwise_reward, rubric_reward
from rewards.workers.runner import RewardRunner


class Endpoint:
    """An OpenAI-compatible endpoint with a rule instead of a model; `script`: statuses to fail with first."""

    def __init__(self, rule):
        self.seen, self.script = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.title(): value for name, value in self.headers.items()}
                outer.seen.append((self.path, headers, body))
                status = outer.script.pop(0) if outer.script else 200
                text = rule(body["messages"][-1]["content"], body)
                answer = {
                    "choices": [{"message": {"content": text}}],
                    "usage": {"prompt_tokens": 1000, "completion_tokens": 10},
                }
                data = json.dumps(answer if status == 200 else {"error": "busy"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture()
def endpoint():
    made = Endpoint(lambda text, body: "Fine. [[8]]" if "BEGIN" in text else "hello")
    yield made
    made.server.shutdown()
    made.server.server_close()


def run(coroutine):
    return asyncio.run(coroutine)


def test_rubric_points_become_a_value_between_0_and_1(endpoint):
    score = run(
        rubric_reward(
            "<think>secret</think>The sky is blue.", "Why?", endpoint.url, "m", prompt_price=2.0, completion_price=10.0
        )
    )
    assert (score.value, score.verdict) == (0.8, "correct")
    assert score.metrics == {
        "judge_prompt_tokens": 1000.0,
        "judge_completion_tokens": 10.0,
        "judge_cost": pytest.approx(0.0021),
    }
    path, _, body = endpoint.seen[0]
    told = body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and "The sky is blue." in told and "secret" not in told


def test_only_the_last_verdict_of_the_judge_counts_and_points_outside_the_scale_are_none(endpoint):
    replies = iter(["[[99]]", "I copy [[10]] from the answer, but say [[3]]"])
    made = Endpoint(lambda text, body: next(replies))
    assert run(rubric_reward("x", "q", made.url, "m")).value == 0.3
    assert [body["seed"] for _, _, body in made.seen] == [0, 1]


def test_pairwise_averages_both_orders():
    prefers_long = Endpoint(
        lambda t, b: (
            "[[A]]" if len(t.split("Answer A:")[1].split("Answer B:")[0]) > len(t.split("Answer B:")[1]) else "[[B]]"
        )
    )
    biased = Endpoint(lambda t, b: "[[A]]")
    tie = Endpoint(lambda t, b: "[[C]]")
    mine, reference = "a long and careful answer " * 20, "short"
    assert run(pairwise_reward(mine, "q", reference, prefers_long.url, "m")).value == 1.0
    assert run(pairwise_reward(reference, "q", mine, prefers_long.url, "m")).value == 0.0
    assert run(pairwise_reward(mine, "q", reference, biased.url, "m")).value == 0.5
    assert run(pairwise_reward(mine, "q", reference, tie.url, "m")).value == 0.5


def test_busy_endpoints_are_asked_again_and_refusals_are_not(endpoint):
    judge = Judge(endpoint.url, "m", retries=3)
    endpoint.script = [429, 503]
    assert judge.ask_now([{"role": "user", "content": "hi"}]).text == "hello" and judge.usage.retries == 2
    endpoint.script = [401]
    with pytest.raises(JudgeError, match="HTTP 401"):
        judge.ask_now([{"role": "user", "content": "other"}])
    assert len(endpoint.seen) == 4


def test_the_cache_is_shared_through_its_file_and_costs_nothing(endpoint, tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    first = Judge(endpoint.url, "m", cache=str(tmp_path / "judge.sqlite"), prompt_price=1.0)
    second = Judge(endpoint.url, "m", cache=str(tmp_path / "judge.sqlite"), prompt_price=1.0)
    assert first.ask_now(messages).text == second.ask_now(messages).text and len(endpoint.seen) == 1
    assert second.usage.cost == 0 and second.usage.cached == 1 and "1 answered from the cache" in str(second.usage)
    assert first.ask_now(messages, seed=1).text and len(endpoint.seen) == 2


def test_the_key_comes_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setitem(os.environ, "MY_KEY", "k-1")
    Judge(endpoint.url, "m", api_key_env="MY_KEY").ask_now([{"role": "user", "content": "hi"}])
    assert endpoint.seen[0][1]["Authorization"] == "Bearer k-1"


def test_in_the_runner_a_dead_endpoint_is_an_error_and_a_live_one_scores_the_group_together(endpoint):
    params = {"base_url": endpoint.url, "model": "m"}
    dead = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}
    specs = [{"fn": "rewards.judge:rubric_reward", "params": p, "timeout": 20} for p in (params, dead)]
    with RewardRunner(specs, workers=1) as runner:
        live, failed = runner.score(["</think>one", "</think>two", "<think>never ends"], {"question": "q"})
    assert [s.verdict for s in live] == ["correct", "correct", "unparsed"]
    assert [s.verdict for s in failed] == ["error", "error", "unparsed"] and "127.0.0.1:9" in failed[0].detail


def test_a_bad_address_is_named():
    with pytest.raises(ValueError, match="expected something like"):
        Judge("localhost:8000", "m")
