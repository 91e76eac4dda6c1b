"""guidellm as a process that stays: its imports take longer than many a measurement.

It notes for each request when it began, when the first and when the last token came: the latency
between tokens is one mean for each answer, so its percentiles are over answers, not over tokens.
Started by besa.bench.generator:

    python -m besa.bench.guidellm_client     # then questions on standard input
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from besa.bench.child import answer_questions, redirect_output
from besa.bench.figures import Request

Updates = Callable[[Any], AsyncIterator[Any]]  # of a group's requests
_ENDS = ("completed", "errored", "cancelled")

# One process makes the requests: several draw the same arrivals, each for itself.
ENVIRONMENT = {
    "GUIDELLM__MP_CONTEXT_TYPE": "forkserver",
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    "GUIDELLM__SCHEDULER_START_DELAY_NON_DISTRIBUTED": "0.2",
    "GUIDELLM__LOGGING__DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    redirect_output()
    # guidellm starts a process for every measurement, which needs all of guidellm, too: it is
    # forked off one that has it (see `ENVIRONMENT`).
    multiprocessing.set_forkserver_preload(["guidellm.benchmark"])
    from guidellm.entrypoints import benchmark_generative_text
    from guidellm.scheduler import WorkerProcessGroup
    from guidellm.scheduler.strategies import AsyncPoissonStrategy, ThroughputStrategy
    from guidellm.schemas.benchmark import BenchmarkScenario

    def start(self: Any, start_time: float) -> None:
        with self._offset.get_lock():
            self._offset.value = start_time
        ThroughputStrategy.init_processes_start(self, start_time)

    # Version 0.8.1 wakes its workers before it tells them when to begin: some began in 1970, and
    # sent everything at once.
    AsyncPoissonStrategy.init_processes_start = start
    WorkerProcessGroup.request_updates = all_updates(WorkerProcessGroup.request_updates)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        scenario = BenchmarkScenario.create(scenario=None, spec=spec(question))
        report, _ = asyncio.run(benchmark_generative_text(scenario, progress=False))
        found = report.benchmarks[0].requests.model_dump(mode="json")
        requests, seconds = requests_of(found)
        lost = len(question["prompts"]) - len(requests)
        requests += [Request(error="guidellm lost it")] * lost
        return {"requests": [asdict(request) for request in requests], "seconds": seconds}

    answer_questions(answer, first={"ready": True})


def spec(question: dict[str, Any]) -> dict[str, Any]:
    """What guidellm is to do."""
    prompts, length = question["prompts"], question["output_length"]
    data: dict[str, Sequence[Any]] = {"prompt": prompts}
    if question["ignore_eos"]:  # a length for each answer makes guidellm ask for all of it
        data["output_tokens_count"] = [length] * len(prompts)
    profile: dict[str, Any] = {"kind": "poisson", "rate": question["rate"]}
    if question["concurrency"]:
        profile = {"kind": "concurrent", "streams": question["concurrency"]}
    return {
        "backend": {
            "kind": "openai_http",
            "target": question["url"],
            "model": question["model"],
            "api_key": question["key"],
            "request_format": "/v1/completions",
            "max_tokens": length,
            "extras": {"body": {"temperature": 0}},
            "validate_backend": False,  # not everyone has /health
        },
        "profile": profile,
        "constraints": [{"kind": "max_requests", "count": len(prompts)}],
        "data": [{"kind": "in_memory_dict", "data": data}],
        "seed": {"kind": "static", "value": question["seed"]},
        "outputs": [],
    }


def all_updates(updates: Updates) -> Updates:
    """guidellm's updates of its requests, the last ones, too.

    Version 0.8.1 is told that all have ended a moment before the last of them arrives: if it looks
    just then, it goes without that one.
    """

    async def every_update(group: Any) -> AsyncIterator[Any]:
        ended = 0
        async for update in updates(group):
            ended += update[2].status in _ENDS
            yield update
        while ended < group.state._state.processed_requests:
            update = await group.messaging.get(timeout=5)
            ended += update[2].status in _ENDS
            yield update

    return every_update


def requests_of(found: dict[str, Any]) -> tuple[list[Request], float]:
    """Requests from guidellm's report, and how long all of them took."""
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
    return requests, (max(ends) - min(starts)) if ends else 0.0


if __name__ == "__main__":
    main()
