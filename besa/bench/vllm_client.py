"""`vllm bench serve` as a process that stays: its imports take longer than many a measurement.

The flags go through vLLM's own parser and its own main function makes the load; only the requests
are the ones that besa gives, the same for every contender. Started by besa.bench.generator:

    python -m besa.bench.vllm_client     # then questions on standard input
"""

from __future__ import annotations

import argparse
import asyncio
import os
import uuid
from dataclasses import asdict
from typing import Any

from besa.bench.child import answer_questions, redirect_output
from besa.bench.figures import Request

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR"}


class _Plain:
    """aiohttp's session, without what vLLM's client always sends and only vLLM's server knows."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def post(self, *args: Any, json: dict[str, Any], **rest: Any) -> Any:
        unsaid = {"repetition_penalty": 1.0, "logprobs": None}
        said = {k: v for k, v in json.items() if k not in unsaid or v != unsaid[k]}
        return self._session.post(*args, json=said, **rest)


def main() -> None:
    redirect_output()
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest

    send = serve.ASYNC_REQUEST_FUNCS["openai"]

    async def sent(*args: Any, session: Any, **rest: Any) -> Any:
        return await send(*args, session=_Plain(session), **rest)

    serve.ASYNC_REQUEST_FUNCS["openai"] = sent
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        os.environ["OPENAI_API_KEY"] = question["key"] or ""
        prompts: list[str] = question["prompts"]
        length: int = question["output_length"]
        chosen = [
            # Sent as x-request-id, which llama-cpp-python's server refuses if it is no UUID.
            SampleRequest(
                prompt=prompt,
                prompt_len=1,
                expected_output_len=length,
                request_id=str(uuid.uuid4()),
            )
            for prompt in prompts
        ]
        serve.get_samples = lambda *_: chosen
        flags = [
            *("--backend", "openai", "--base-url", question["url"], "--model", question["model"]),
            *("--dataset-name", "custom", "--num-prompts", str(len(prompts))),
            *("--skip-tokenizer-init", "--disable-tqdm", "--save-detailed"),
            *("--temperature", "0", "--seed", str(question["seed"])),
            *("--ready-check-timeout-sec", "0", "--request-rate", str(question["rate"] or "inf")),
        ]
        if question["ignore_eos"]:
            flags.append("--ignore-eos")
        if question["concurrency"]:
            flags += ["--max-concurrency", str(question["concurrency"])]
        found = asyncio.run(serve.main_async(parser.parse_args(flags)))
        requests, seconds = requests_of(found, length)
        return {"requests": [asdict(request) for request in requests], "seconds": seconds}

    answer_questions(answer, first={"ready": True})


def requests_of(found: dict[str, Any], output_length: int) -> tuple[list[Request], float]:
    """Requests from the lists of `--save-detailed`, and how long all of them took."""
    requests, ends = [], []
    for index, error in enumerate(found["errors"]):
        gaps = tuple(found["itls"][index])
        ttft, latency = found["ttfts"][index], found["latencies"][index]
        failed = _last_line(error)
        if not failed and not ttft:
            failed = "no answer, and no reason"
        # Where a server does not count its tokens, the pieces of its answer are, as long as there
        # are no more than tokens were asked for: an end may be a piece of its own.
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
    return requests, max(ends) - min(found["start_times"])


def _last_line(error: str) -> str:
    """A reason, or the last line of a traceback: the one that says what it was."""
    lines = [line for line in error.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


if __name__ == "__main__":
    main()
