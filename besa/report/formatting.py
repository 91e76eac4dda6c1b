"""How figures read on a page, in a card and in a terminal.

>>> percent(0.4999), signed(0.186), rate(0.625), duration(123.4), size(3 * 2**30)
('50.0%', '+18.6%', '62.5%', '2 min 03 s', '3.0 GiB')
>>> significant(0.012345), significant(None)
('0.0123', '–')
"""

from __future__ import annotations

import math

NONE = "\N{EN DASH}"  # what stands where there is no figure


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def rate(share: float) -> str:
    """A target as a user would write it: 50%, 62.5%."""
    return f"{100 * share:.6g}%"


def signed(share: float, digits: int = 1) -> str:
    """A percentage with its sign, a typographer's minus; zero has none."""
    text = f"{100 * share:+.{digits}f}%".replace("-", "\N{MINUS SIGN}")
    return text[1:] if float(f"{100 * share:.{digits}f}") == 0 else text


def significant(value: float | None) -> str:
    """Three significant figures, with an exponent for very small and very large numbers only."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    return f"{value:.{max(2 - power, 0)}f}" if -4 <= power < 6 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """12.3 s, 2 min 03 s, 1 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: float | None) -> str:
    """Bytes, in the unit that leaves three figures or so."""
    if count is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def in_windows(seqlen: int, bos: bool) -> str:
    """How a text was read: tokens in a window, and whether each began with a beginning token."""
    return f"in windows of {seqlen:,}{', each after a beginning token' if bos else ''}"
