"""How many samples nothing is learned from: what is kept is what is best there."""

from __future__ import annotations

# One in so many is held out; of fewer there are none to choose by.
HELD_OUT = 8
