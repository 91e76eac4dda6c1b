"""The heat map's colours: blue below the target, orange above it, the page's own tone at it.

Blue against orange is told apart with every common colour blindness, and the lightness falls
(on paper) or rises (on a dark screen) on both sides, so that it survives a grey print as distance
from the target.

>>> level(0.5, 0.5, 0.1), level(0.35, 0.5, 0.1), level(0.6, 0.5, 0.1)
(10, 0, 20)
"""

from __future__ import annotations

LEVELS = 21  # odd: the middle one is the target
LIGHT = ("#174a87", "#7fb0dc", "#efede6", "#eba765", "#8f3a06")
DARK = ("#a5d2ff", "#3a74b4", "#2c2f36", "#b3622a", "#ffc08f")


def level(value: float, target: float, extent: float) -> int:
    """Which of the LEVELS colours stands for `value`; beyond target ± extent, the last one."""
    middle = LEVELS // 2
    return middle + max(-middle, min(middle, round((value - target) / extent * middle)))


def rules(stops: tuple[str, ...]) -> str:
    """CSS: `.h7` fills with the seventh colour, `.v7` with an ink that can be read on it."""
    found = []
    for index in range(LEVELS):
        colour = _between(stops, index / (LEVELS - 1))
        ink = "#14161a" if _luminance(colour) > 0.2 else "#fff"
        found.append(f".h{index}{{fill:#{colour.hex()}}}svg .v{index}{{fill:{ink}}}")
    return "".join(found)


def _between(stops: tuple[str, ...], place: float) -> bytes:
    at = place * (len(stops) - 1)
    first = min(int(at), len(stops) - 2)
    a, b = (bytes.fromhex(stop[1:]) for stop in stops[first : first + 2])
    return bytes(round(x + (y - x) * (at - first)) for x, y in zip(a, b, strict=True))


def _luminance(colour: bytes) -> float:
    parts = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
