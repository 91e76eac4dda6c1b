"""guidellm as the load generator, a process for every measurement.

It writes for each request when it began, when the first and when the last token came: the latency
between tokens is one mean for each answer, so its percentiles are over answers, not over tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa.bench.child import ChildError
from besa.bench.figures import Request
from besa.bench.load import Load

if TYPE_CHECKING:
    from besa.bench.generator import Target


class GuideLLM:
    """guidellm's command line."""

    name = "guidellm"

    def __init__(self) -> None:
        self.version = version("guidellm")

    def __enter__(self) -> GuideLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cpu(self) -> float:
        return 0.0  # what has ended counts as the parent's

    def measure(
        self,
        target: Target,
        prompts: Sequence[str],
        load: Load,
        output_length: int,
        seed: int,
        limit: float,
    ) -> tuple[list[Request], float]:
        from besa.bench.child import run_to_end

        profile = {"concurrency": "concurrent,streams=", "rate": "poisson,rate="}[load.kind]
        value = f"{load.value:g}"
        with tempfile.TemporaryDirectory(prefix="besa-bench-") as folder:
            data, result = Path(folder) / "prompts.jsonl", Path(folder) / "result.json"
            lines = [{"prompt": p, "output_tokens_count": output_length} for p in prompts]
            data.write_text("".join(json.dumps(line) + "\n" for line in lines))
            backend = f"kind=openai_http,target={target.url},model={target.model}"
            if target.key:
                backend += f",api_key={target.key}"
            command = [
                *(sys.executable, "-m", "guidellm", "run", "--disable-console"),
                *("--backend", backend + ",request_format=/v1/completions"),
                *("--profile", f"kind={profile}{value}"),
                *("--data", f"kind=json_file,path={data}"),
                *("--constraint", f"kind=max_requests,count={len(prompts)}"),
                *("--seed", f"kind=static,seed={seed}"),
                *("--output", f"kind=json,path={result}"),
            ]
            run_to_end(command, limit, {"HF_HUB_OFFLINE": "1", "HF_HOME": folder})
            if not result.exists():
                raise ChildError("guidellm wrote no result")
            return from_guidellm(json.loads(result.read_text())["benchmarks"][0]["requests"])


def from_guidellm(found: dict[str, Any]) -> tuple[list[Request], float]:
    """Requests from guidellm's JSON, and how long all of them took."""
    requests, starts, ends = [], [], []
    for one in found["successful"]:
        times = one["info"]["timings"]
        start, last = times["request_start"], times["last_token_iteration"]
        first, tokens = times["first_token_iteration"], int(one["output_tokens"] or 0)
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
