"""What is measured inside an engine."""

from __future__ import annotations

# As besa.bench.figures.FIGURES: the name, its unit, and whether more of it is better.
OFFLINE_FIGURES: dict[str, tuple[str, str, bool]] = {
    "prefill": ("time for the prompts of the whole batch", "s", False),
    "step": ("time for one token of every sequence", "s", False),
    "decode_tps": ("output tokens per second while decoding", "tokens/s", True),
}
