"""What a result depends on besides a command's own settings: model, machine, versions.

>>> found = conditions(
...     "path/to/model", Checkpoint.open("path/to/model"), torch.device("cpu"), torch.float32
... )
>>> found["device"], found["dtype"]
('cpu', 'float32')
>>> from besa.processes.ranks import ALONE
>>> check_alike({"model_fingerprint": "8c1f", "threads": 2}, ALONE)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.processes.ranks import Ranks
from besa.version import __version__


def conditions(
    model: str | Path, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What an unfinished run must share to be gone on with, beside its settings.

    Args:
        model: as it was named.
        checkpoint: the same, or what stands for it.
        device, dtype: of the computation.
    """
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": str(model),
        "model_fingerprint": checkpoint.fingerprint(),
        "besa": __version__,
        "torch": torch.__version__,
    }


def resumable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a run which goes on must share; it may have other threads and processes."""
    return {name: value for name, value in settings.items() if name != "threads"}


def check_alike(settings: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises a BesaError if processes, on several machines, are about to do different things.

    Args:
        settings: of this process.
    """
    ours, *others = [resumable(each) for each in ranks.gather(dict(settings))]
    for rank, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != ours[name]:
                raise BesaError(
                    f"process {rank} has {name} = {value}, and process 0 {ours[name]}: give all "
                    "machines the same model, text and versions"
                )
