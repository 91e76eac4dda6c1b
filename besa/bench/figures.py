"""What a load generator saw of its requests, and the figures that follow from it.

>>> one = Request(ttft=0.2, gaps=(0.1, 0.3), latency=0.6, output_tokens=3)
>>> found = figures([one], duration=0.6)
>>> found["ttft_p50"], found["itl_p50"], found["output_tps"]
(0.2, 0.2, 5.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from besa.bench.statistics import percentile

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Request:
    """One request, as the client saw it. Times in seconds.

    Attributes:
        error: what went wrong, in a line; empty if nothing did.
        ttft: from sending it to the first token.
        gaps: between one piece of the answer and the next.
        latency: from sending it to the last token.
        input_tokens, output_tokens: as the server counts them.
        text: the answer.
    """

    error: str = ""
    ttft: float = 0.0
    gaps: tuple[float, ...] = ()
    latency: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""


# The figures of a load over HTTP, and whether more of each is better. Times are in seconds.
SERVING: dict[str, bool] = {
    **{f"ttft_{p}": False for p in SHARES},  # time to first token
    **{f"itl_{p}": False for p in SHARES},  # inter-token latency
    **{f"e2e_{p}": False for p in SHARES},  # end-to-end latency
    "tpot": False,  # time per output token, mean over the requests
    "output_tps": True,  # output tokens per second
    "rps": True,  # requests per second
}
# The same of a batch inside an engine.
OFFLINE: dict[str, bool] = {
    "prefill": False,  # time for the prompts of the whole batch
    "step": False,  # time for one token of every sequence
    "decode_tps": True,  # output tokens per second while decoding
}
# What a load at a rate leaves to the server, which can do no more than it is asked to.
THROUGHPUT = ("output_tps", "rps")


def figures(requests: Sequence[Request], duration: float) -> dict[str, float]:
    """The figures of one measurement.

    Args:
        requests: at least one, none of them failed.
        duration: seconds from the first request's start to the last one's end.

    Returns:
        A value for each of `SERVING`; those between tokens only where an answer has two.
    """
    found: dict[str, float] = {}
    gaps = [gap for request in requests for gap in request.gaps]
    for name, values in (
        ("ttft", [r.ttft for r in requests]),
        ("itl", gaps),
        ("e2e", [r.latency for r in requests]),
    ):
        if values:
            found |= {f"{name}_{p}": percentile(values, share) for p, share in SHARES.items()}
    spans = [(r.latency - r.ttft) / (r.output_tokens - 1) for r in requests if r.output_tokens > 1]
    if spans:
        found["tpot"] = sum(spans) / len(spans)
    found["output_tps"] = sum(r.output_tokens for r in requests) / duration
    found["rps"] = len(requests) / duration
    return found
