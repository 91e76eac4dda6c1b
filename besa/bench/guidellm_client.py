"""guidellm as a load generator: it needs no engine, but tells only each answer's mean gap.

It notes for each request when it began, and when the first and the last token came. So percentiles
of the latency between tokens are over answers, not over tokens.
"""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

from besa.bench.figures import Request
from besa.bench.load_client import Answered, Order

Updates = Callable[[Any], AsyncIterator[Any]]  # of a worker group's requests
_ENDS = ("completed", "errored", "cancelled")
# Before the first request of a rate: a worker that is not ready sends late ones together.
_LEAD_SECONDS = 1.0


class GuidellmClient:
    """As `besa.bench.load_client.LoadClient`."""

    name: ClassVar[str] = "guidellm"
    environment: ClassVar[Mapping[str, str]] = {
        "GUIDELLM__MP_CONTEXT_TYPE": "forkserver",
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
        "GUIDELLM__SCHEDULER_START_DELAY_NON_DISTRIBUTED": "0.2",
        "GUIDELLM__LOGGING__DISABLED": "true",
        "HF_HUB_OFFLINE": "1",
    }

    def version(self) -> str | None:
        return version("guidellm") if importlib.util.find_spec("guidellm") else None

    def load(self) -> Callable[[Order], Answered]:
        # guidellm starts a process for every measurement, which needs all of guidellm, too: it is
        # forked off one that has it (see `environment`).
        multiprocessing.set_forkserver_preload(["guidellm.benchmark"])
        from guidellm.entrypoints import benchmark_generative_text
        from guidellm.scheduler import WorkerProcessGroup
        from guidellm.schemas.benchmark import BenchmarkScenario

        WorkerProcessGroup.request_updates = all_updates(WorkerProcessGroup.request_updates)

        def make_load(order: Order) -> Answered:
            scenario = BenchmarkScenario.create(scenario=None, spec=specification(order))
            report, _ = asyncio.run(benchmark_generative_text(scenario, progress=False))
            found = report.benchmarks[0].requests.model_dump(mode="json")
            return answered(found, len(order.prompts))

        return make_load


def specification(order: Order) -> dict[str, Any]:
    """A `BenchmarkScenario` as guidellm's files have it."""
    data: dict[str, Sequence[Any]] = {"prompt": order.prompts}
    if order.ignore_eos:  # a length for each answer makes guidellm ask for all of it
        data["output_tokens_count"] = [order.output_length] * len(order.prompts)
    if order.concurrency:
        profile = {"kind": "concurrent", "streams": order.concurrency}
    else:
        # A trace of times that besa has drawn. guidellm's own Poisson profile wakes its workers
        # before it tells them when to begin (0.8.1): some begin in 1970, and send all at once.
        profile = {"kind": "replay", "schedule_turn": "timestamp"}
        data["relative_timestamp"] = [_LEAD_SECONDS + seconds for seconds in order.arrivals()]
    return {
        "backend": {
            "kind": "openai_http",
            "target": order.url,
            "model": order.model,
            "api_key": order.key,
            "request_format": "/v1/completions",
            "max_tokens": order.output_length,
            "extras": {"body": {"temperature": 0}},
            "validate_backend": False,  # not every server has /health
        },
        "profile": profile,
        "constraints": [{"kind": "max_requests", "count": len(order.prompts)}],
        "data": [{"kind": "in_memory_dict", "data": data}],
        "seed": {"kind": "static", "value": order.seed},
        "outputs": [],
    }


def all_updates(updates: Updates) -> Updates:
    """guidellm's updates of its requests, with those that come last.

    Version 0.8.1 sees that all requests have ended a moment before the update of the last one
    arrives: if it looks just then, its report lacks that request. No setting prevents this, so a
    public method is replaced, by one that waits for as many ends as the group's state has counted.
    """

    async def every_update(group: Any) -> AsyncIterator[Any]:
        ended = 0
        async for update in updates(group):
            ended += update[2].status in _ENDS
            yield update
        while ended < group.state.update_state().state.processed_requests:
            update = await group.messaging.get(timeout=5)
            ended += update[2].status in _ENDS
            yield update

    return every_update


def answered(found: Mapping[str, Any], asked: int) -> Answered:
    """The requests of guidellm's report; one that it has lost has failed."""
    requests, starts, ends = [], [], []
    for one in found["successful"]:
        times = one["info"]["timings"]
        start, last = times["request_start"], times["last_token_iteration"]
        first, tokens = times["first_token_iteration"], int(one["output_tokens"] or 0)
        if first is None or last is None:
            requests.append(Request(error="its answer has no text"))
            continue
        mean = ((last - first) / (tokens - 1),) if tokens > 1 else ()
        requests.append(
            Request(
                ttft=first - start,
                gaps=mean,
                latency=last - start,
                input_tokens=int(one["prompt_tokens"] or 0),
                output_tokens=tokens,
                text=one["output"] or "",
            )
        )
        starts.append(start)
        ends.append(last)
    requests += [
        Request(error=str(one["info"].get("error") or "not finished"))
        for one in [*found["errored"], *found["incomplete"]]
    ]
    requests += [Request(error="guidellm lost it")] * (asked - len(requests))
    return Answered(tuple(requests), (max(ends) - min(starts)) if ends else 0.0)
