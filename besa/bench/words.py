"""How figures read, in the terminal and on the page alike.

>>> seconds(0.0123), seconds(1.5), amount("output_tps", {"median": 10.26})
('12.3 ms', '1.50 s', '10.3/s')
>>> change({"median": 1.42, "low": 1.4, "high": 1.45, "verdict": "better"})
'1.42× (1.40–1.45)'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from besa.bench.statistics import NO_DIFFERENCE

FIGURE_NAMES = {
    "ttft_p50": "first token",
    "ttft_p90": "first token, p90",
    "ttft_p99": "first token, p99",
    "itl_p50": "between tokens",
    "itl_p90": "between tokens, p90",
    "itl_p99": "between tokens, p99",
    "e2e_p50": "end to end",
    "e2e_p90": "end to end, p90",
    "e2e_p99": "end to end, p99",
    "tpot": "per token, mean",
    "output_tps": "output tokens",
    "rps": "requests",
    "prefill": "prompt",
    "step": "step",
    "decode_tps": "output tokens",
}
_PER_SECOND = ("output_tps", "rps", "decode_tps")


def seconds(value: float) -> str:
    """Three figures, in milliseconds below a second."""
    if value >= 1:
        return f"{value:.3g} s" if value >= 100 else f"{value:.2f} s"
    thousandths = value * 1000
    digits = 0 if thousandths >= 100 else 1 if thousandths >= 10 else 2
    return f"{thousandths:.{digits}f} ms"


def amount(figure: str, spread: Mapping[str, Any] | None) -> str:
    """A figure's median with its unit."""
    if spread is None or spread["median"] is None:
        return "–"
    value = spread["median"]
    if figure in _PER_SECOND:
        return f"{value:.0f}/s" if value >= 100 else f"{value:.3g}/s"
    return seconds(value)


def change(gain: Mapping[str, Any]) -> str:
    """A gain with its spread; only that where it swallows the difference."""
    span = f"{gain['low']:.2f}–{gain['high']:.2f}"
    if gain["verdict"] == NO_DIFFERENCE:
        return f"no difference ({span})"
    return f"{gain['median']:.2f}×" + (f" ({span})" if gain["verdict"] else "")


def against(results: Mapping[str, Any]) -> str:
    """What the gains are over: inside several engines, each one's own first contender."""
    engines = {one["engine"] for one in results["contenders"]}
    if results["kind"] == "offline" and len(engines) > 1:
        return "the first in the same engine"
    return str(results["reference"])


def conditions(results: Mapping[str, Any]) -> str:
    """What the figures depend on, in a line."""
    settings, machine = results["settings"], results["machine"]
    rounds = settings["rounds"]
    parts = ["one round" if rounds == 1 else f"{rounds} rounds in turns, medians"]
    if results["kind"] == "serving":
        what = "" if settings["prompts"] == "synthetic" else f" ({settings['prompts']})"
        parts.append(
            f"{settings['input_length']} tokens in{what}, {settings['output_length']} out"
            if not what
            else f"prompts of {settings['prompts']}, {settings['output_length']} tokens out"
        )
    if results["reference"] is not None and len(results["contenders"]) > 1:
        confidence = next(
            (
                gain["confidence"]
                for loads in results["comparisons"].values()
                for figures in loads.values()
                for gain in figures.values()
            ),
            0,
        )
        held = f"; each span holds the median with {confidence:.0%}" if confidence else ""
        parts.append(f"gains over {against(results)}, paired by round{held}")
    generator = results.get("generator")
    if generator:
        parts.append(f"load by {generator['name']} {generator['version']}")
    cores = f"{machine['cores']} cores" + "".join(f", {name}" for name in machine["gpus"])
    parts.append(f"{machine['cpu']}, {cores}")
    return "; ".join(parts) + "."
