"""Telemetry is off in every process that besa starts, unless the user turned it on.

>>> sorted(switches())
['DO_NOT_TRACK', 'HF_HUB_DISABLE_TELEMETRY', 'ORT_DISABLE_TELEMETRY', 'VLLM_NO_USAGE_STATS']
>>> turn_off()  # here, before the libraries are imported that send it

The libraries that besa calls report home by default, each until a variable of its own is set.
"""

from __future__ import annotations

import os

_SWITCHES = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",  # what several libraries heed
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime
}


def switches() -> dict[str, str]:
    """The variables that turn telemetry off; those that the user has set are as they are."""
    return {name: os.environ.get(name, value) for name, value in _SWITCHES.items()}


def turn_off() -> None:
    """Sets them for this process, and so for those that it starts."""
    os.environ.update(switches())
