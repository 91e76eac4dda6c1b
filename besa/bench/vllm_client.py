"""`vllm bench serve` as a process that stays: its imports take longer than many a measurement.

The flags go through vLLM's own parser and its own main function makes the load; only the requests
are the ones that besa gives, the same for every contender. Started by besa.bench.generator:

    python -m besa.bench.vllm_client     # then questions on standard input
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from besa.bench.child import answer_questions, start_child


class _Plain:
    """aiohttp's session, without what vLLM's client always sends and only vLLM's server knows."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def post(self, *args: Any, json: dict[str, Any], **rest: Any) -> Any:
        unsaid = {"repetition_penalty": 1.0, "logprobs": None}
        said = {k: v for k, v in json.items() if k not in unsaid or v != unsaid[k]}
        return self._session.post(*args, json=said, **rest)


def main() -> None:
    start_child()
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
            SampleRequest(
                prompt=prompt, prompt_len=1, expected_output_len=length, request_id=str(i)
            )
            for i, prompt in enumerate(prompts)
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
        keys = ("ttfts", "itls", "latencies", "start_times", "input_lens", "output_lens")
        return {key: found[key] for key in (*keys, "generated_texts", "errors")}

    answer_questions(answer, first={"ready": True})


if __name__ == "__main__":
    main()
