"""`vllm bench serve` as a load generator: the gap before every single token, by a monotonic clock.

Its function `benchmark` is called with besa's own requests, so that they are the same for every
contender. It sends them through a function that is looked up by a backend's name; besa adds one of
its own, "besa", which is vLLM's for OpenAI's API without what only vLLM's server understands.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from besa.bench.figures import Request
from besa.bench.load_client import Answered, Order
from besa.processes.child import last_line
from besa.serve.vllm.engine import vllm_version

_BACKEND = "besa"


class VllmClient:
    """As `besa.bench.load_client.LoadClient`."""

    name: ClassVar[str] = "vllm bench serve"
    environment: ClassVar[Mapping[str, str]] = {
        "VLLM_LOGGING_LEVEL": "ERROR",
    }

    def version(self) -> str | None:
        return vllm_version()

    def load(self) -> Callable[[Order], Answered]:
        import numpy as np
        from vllm.benchmarks import serve
        from vllm.benchmarks.datasets import SampleRequest

        send = serve.ASYNC_REQUEST_FUNCS["openai"]

        async def send_plainly(*args: Any, session: Any, **rest: Any) -> Any:
            return await send(*args, session=_PlainSession(session), **rest)

        serve.ASYNC_REQUEST_FUNCS[_BACKEND] = send_plainly

        def make_load(order: Order) -> Answered:
            os.environ["OPENAI_API_KEY"] = order.key or ""
            random.seed(order.seed)
            np.random.seed(order.seed)  # noqa: NPY002 - vLLM draws the times of requests by it
            requests = [
                SampleRequest(
                    prompt=prompt,
                    prompt_len=1,
                    expected_output_len=order.output_length,
                    # Sent as x-request-id, which llama-cpp-python's server refuses if it is no
                    # UUID.
                    request_id=str(uuid.uuid4()),
                )
                for prompt in order.prompts
            ]
            gc.collect()
            gc.freeze()  # a pause of the collector would be in the figures
            found = asyncio.run(serve.benchmark(input_requests=requests, **options(order)))
            return answered(found, order.output_length)

        return make_load


def options(order: Order) -> dict[str, Any]:
    """The arguments of vLLM's `benchmark`, without the requests."""
    return {
        "task_type": _task_type(),
        "endpoint_type": _BACKEND,
        "api_url": f"{order.url}/v1/completions",
        "base_url": order.url,
        "model_id": order.model,
        "model_name": order.model,
        "tokenizer": None,
        "logprobs": None,
        "request_rate": order.rate or float("inf"),
        "burstiness": 1.0,  # a Poisson process
        "disable_tqdm": True,
        "num_warmups": 0,
        "profile": False,
        "selected_percentile_metrics": [],
        "selected_percentiles": [],
        "ignore_eos": order.ignore_eos,
        "goodput_config_dict": {},
        "max_concurrency": order.concurrency,
        "lora_modules": None,
        "extra_headers": None,
        "extra_body": {"temperature": 0.0},
        "ready_check_timeout_sec": 0,
    }


def _task_type() -> Any:
    from vllm.benchmarks.serve import TaskType

    return TaskType.GENERATION


class _PlainSession:
    """aiohttp's session, without what vLLM's client always sends and only vLLM's server knows."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def post(self, *args: Any, json: dict[str, Any], **rest: Any) -> Any:
        defaults = {"repetition_penalty": 1.0, "logprobs": None}
        body = {k: v for k, v in json.items() if k not in defaults or v != defaults[k]}
        return self._session.post(*args, json=body, **rest)


def answered(found: Mapping[str, Any], output_length: int) -> Answered:
    """The requests, from the lists that `benchmark` gives."""
    requests, ends = [], []
    for index, error in enumerate(found["errors"]):
        gaps = tuple(found["itls"][index])
        ttft, latency = found["ttfts"][index], found["latencies"][index]
        failed = last_line(error)
        if not failed and not ttft:
            failed = "no answer, and no reason"
        # Where a server does not count its tokens, the pieces of its answer are counted, as long as
        # they are no more than the tokens that were asked for: an end may be a piece of its own.
        counted = found["output_lens"][index]
        tokens = counted if counted > 1 else min(len(gaps) + 1, output_length)
        requests.append(
            Request(
                error=failed,
                ttft=ttft,
                gaps=gaps,
                latency=latency,
                input_tokens=found["input_lens"][index],
                output_tokens=0 if failed else tokens,
                text=found["generated_texts"][index],
            )
        )
        ends.append(found["start_times"][index] + latency)
    return Answered(tuple(requests), max(ends) - min(found["start_times"]))
