"""How figures read, in the terminal and on the page alike.

>>> from besa.bench.statistics import gain, spread
>>> seconds(0.0123), seconds(1.5), amount("output_tps", spread([10.2, 10.26, 10.3]))
('12.3 ms', '1.50 s', '10.3/s')
>>> change(gain([1.40, 1.41, 1.42, 1.43, 1.45], [1.0] * 5, higher_is_better=True))
'1.42× (1.40–1.45)'
"""

from __future__ import annotations

import math

from besa.bench.results import Results
from besa.bench.statistics import NO_DIFFERENCE, Gain, Spread
from besa.report.formatting import NONE

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


def amount(figure: str, spread: Spread | None) -> str:
    """A figure's median with its unit."""
    if spread is None or math.isnan(spread.median):
        return NONE
    value = spread.median
    if figure in _PER_SECOND:
        return f"{value:.0f}/s" if value >= 100 else f"{value:.3g}/s"
    return seconds(value)


def interval(spread: Spread | Gain) -> str:
    """The ends of a ratio's interval."""
    return f"{spread.low:.2f}–{spread.high:.2f}"


def change(gain: Gain) -> str:
    """A gain with its interval; only the interval where that holds 1, which is no difference."""
    if gain.verdict == NO_DIFFERENCE:
        return f"no difference ({interval(gain)})"
    return f"{gain.median:.2f}×" + (f" ({interval(gain)})" if gain.verdict else "")


def against(results: Results) -> str:
    """What the gains are over: inside several engines, each one's own first contender."""
    engines = {contender.engine for contender in results.contenders}
    if results.kind == "offline" and len(engines) > 1:
        return "the first in the same engine"
    return str(results.reference)


def conditions(results: Results) -> str:
    """What the figures depend on, in a line."""
    settings, machine = results.settings, results.machine
    rounds = settings.rounds
    parts = ["one round" if rounds == 1 else f"{rounds} rounds in turns, medians"]
    if results.kind == "serving" and settings.prompts == "synthetic":
        parts.append(f"{settings.input_length} tokens in, {settings.output_length} out")
    elif results.kind == "serving":
        parts.append(f"prompts of {settings.prompts}, {settings.output_length} tokens out")
    if results.reference is not None and len(results.contenders) > 1:
        confidence = _confidence(results)
        held = f"; each span holds the median with {confidence:.0%}" if confidence else ""
        parts.append(f"gains over {against(results)}, paired by round{held}")
    if results.generator is not None:
        parts.append(f"load by {results.generator.name} {results.generator.version}")
    cores = f"{machine.cores} cores" + "".join(f", {name}" for name in machine.gpus)
    parts.append(f"{machine.cpu}, {cores}")
    return "; ".join(parts) + "."


def _confidence(results: Results) -> float | None:
    """With which every gain's interval holds the median: all have the same rounds."""
    for loads in results.comparisons.values():
        for gains in loads.values():
            for gain in gains.values():
                return gain.confidence
    return None
