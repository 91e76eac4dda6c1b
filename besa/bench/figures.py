"""What a load generator saw of its requests, and the figures that follow from it.

figures(requests, duration)["ttft_p50"]     # seconds
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


# Every figure: what it is called, its unit, and whether more of it is better.
FIGURES: dict[str, tuple[str, str, bool]] = {
    **{f"ttft_{p}": (f"time to first token, {p}", "s", False) for p in SHARES},
    **{f"itl_{p}": (f"inter-token latency, {p}", "s", False) for p in SHARES},
    **{f"e2e_{p}": (f"end-to-end latency, {p}", "s", False) for p in SHARES},
    "tpot": ("time per output token, mean", "s", False),
    "output_tps": ("output tokens per second", "tokens/s", True),
    "rps": ("requests per second", "requests/s", True),
}


def figures(requests: Sequence[Request], duration: float) -> dict[str, float]:
    """The figures of one measurement.

    Args:
        requests: at least one, none of them failed.
        duration: seconds from the first request's start to the last one's end.

    Returns:
        A value for each of `FIGURES`; those between tokens only where an answer has two.
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
