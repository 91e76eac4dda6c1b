"""What each load generator is asked for, and how its answers are read."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest

from besa.bench import guidellm_client, vllm_client
from besa.bench.load_client import Answered, Order
from besa.typed_json import from_json, to_json

ORDER = Order(
    url="http://127.0.0.1:8000",
    model="tiny",
    key="secret",
    prompts=("one", "two"),
    output_length=8,
    ignore_eos=True,
    concurrency=2,
    rate=None,
    seed=3,
)
PACED = replace(ORDER, concurrency=None, rate=4.0)


def test_an_order_survives_the_pipe_and_hides_its_key() -> None:
    assert from_json(Order, to_json(ORDER)) == ORDER
    assert "secret" not in repr(ORDER)


def test_arrivals_are_a_poisson_process() -> None:
    order = replace(PACED, prompts=("x",) * 4000)
    times = order.arrivals()
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert times == order.arrivals()
    assert times != replace(order, seed=4).arrivals()


def test_guidellm_keeps_so_many_at_a_time() -> None:
    asked = guidellm_client.specification(ORDER)
    assert asked["profile"] == {"kind": "concurrent", "streams": 2}
    assert asked["data"][0]["data"]["output_tokens_count"] == [8, 8]
    assert "relative_timestamp" not in asked["data"][0]["data"]


def test_guidellm_sends_at_the_times_that_were_drawn() -> None:
    asked = guidellm_client.specification(replace(PACED, ignore_eos=False))
    assert asked["profile"] == {"kind": "replay", "schedule_turn": "timestamp"}
    first, second = asked["data"][0]["data"]["relative_timestamp"]
    a, b = PACED.arrivals()
    assert second - first == pytest.approx(b - a)
    assert "output_tokens_count" not in asked["data"][0]["data"]


def test_guidellms_report_is_read() -> None:
    def times(first: float | None) -> dict[str, Any]:
        return {
            "timings": {
                "request_start": 10.0,
                "first_token_iteration": first,
                "last_token_iteration": 10.9,
            }
        }

    good = {"info": times(10.2), "output_tokens": 8, "prompt_tokens": 4, "output": "text"}
    mute = {**good, "info": times(None)}
    failed = {"info": {"error": "refused"}}
    report = {"successful": [good, mute], "errored": [failed], "incomplete": []}
    answered = guidellm_client.answered(report, asked=4)
    first, *others = answered.requests
    assert (first.ttft, first.latency) == (pytest.approx(0.2), pytest.approx(0.9))
    assert first.gaps == (pytest.approx(0.1),)
    errors = ["its answer has no text", "refused", "guidellm lost it"]
    assert [request.error for request in others] == errors
    assert answered.seconds == pytest.approx(0.9)


def test_vllms_lists_are_read() -> None:
    found = {
        "errors": ["", "Traceback:\n  in it\nOSError: refused\n", "", ""],
        "ttfts": [0.2, 0.0, 0.0, 0.1],
        "itls": [[0.1, 0.1], [], [], [0.1] * 9],
        "latencies": [0.4, 0.0, 0.0, 1.0],
        "output_lens": [3, 0, 0, 0],
        "input_lens": [4, 4, 4, 4],
        "generated_texts": ["a", "", "", "b"],
        "start_times": [10.0, 10.0, 10.1, 10.2],
    }
    answered = vllm_client.answered(found, output_length=8)
    good, failed, silent, uncounted = answered.requests
    assert (good.ttft, good.gaps, good.output_tokens) == (0.2, (0.1, 0.1), 3)
    assert (failed.error, failed.output_tokens) == ("OSError: refused", 0)
    assert silent.error == "no answer, and no reason"
    assert uncounted.output_tokens == 8  # as many pieces as were asked for, not as came
    assert answered.seconds == pytest.approx(1.2)
    assert from_json(Answered, to_json(answered)) == answered
