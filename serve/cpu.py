"""The cores that an engine may compute on, and the memory that its sequences take.

>>> cores = sum(map(len, physical_cores()))  # one number for each core, by memory node
>>> 1 <= threads() <= cores  # fewer where OMP_NUM_THREADS or a container says so
True
>>> longest_sequence(
...     {
...         "num_hidden_layers": 32,
...         "num_attention_heads": 32,
...         "num_key_value_heads": 8,
...         "hidden_size": 4096,
...         "max_position_embeddings": 8192,
...         "dtype": "bfloat16",
...     }
... )  # bytes of keys and values
1073741824

Hyper-threads share the units that the kernels keep busy: only one of each core is used.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from besa.machine import core_share

_SYSTEM = Path("/sys/devices/system")


def threads() -> int:
    """For an engine of one process that takes a number: one for each core, or fewer if asked."""
    cores = sum(map(len, physical_cores()))
    return min(cores, most_threads(ranks=1) or cores)


def most_threads(ranks: int) -> int | None:
    """The threads that the user and the container leave to each of so many ranks."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    most = int(asked) if asked.isdigit() and int(asked) else None
    if (share := core_share()) is not None:
        granted = max(1, math.ceil(share) // ranks)
        most = granted if most is None else min(most, granted)
    return most


def physical_cores() -> list[list[int]]:
    """One logical CPU of each core that this process may run on, by memory node."""
    allowed = os.sched_getaffinity(0)
    first: dict[frozenset[int], int] = {}
    for cpu in sorted(allowed):
        siblings = _ids(_SYSTEM / f"cpu/cpu{cpu}/topology/thread_siblings_list") or {cpu}
        first.setdefault(frozenset(siblings), cpu)
    chosen = set(first.values())
    directories = (_SYSTEM / "node").glob("node[0-9]*")
    numbered = sorted(directories, key=lambda path: int(path.name.removeprefix("node")))
    nodes = [sorted(chosen & _ids(path / "cpulist")) for path in numbered]
    return [node for node in nodes if node] or [sorted(chosen)]


def _ids(path: Path) -> set[int]:
    """The numbers in a list of the kernel's, as "0,2-4"."""
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return set()
    ends = [[int(end) for end in part.split("-")] for part in parts if part]
    return {number for end in ends for number in range(end[0], end[-1] + 1)}


def longest_sequence(config: dict[str, Any]) -> int | None:
    """Bytes of keys and values of as many tokens as a model takes; None where config.json lacks it.

    That some layers look at a window only, or share what they keep, is not taken off.
    """
    text = {**config, **(config.get("text_config") or {})}
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    width, tokens = text.get("hidden_size"), text.get("max_position_embeddings")
    if not (layers and heads and width and tokens):
        return None
    kept = text.get("num_key_value_heads") or heads
    size = text.get("head_dim") or width // heads
    dtype = str(text.get("dtype") or text.get("torch_dtype"))
    return int(2 * layers * kept * size * tokens * (4 if dtype.endswith("float32") else 2))
