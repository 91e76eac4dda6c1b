"""What a result depends on besides a command's own settings: model, machine, versions.

>>> found = conditions(
...     "path/to/model", Checkpoint.open("path/to/model"), torch.device("cpu"), torch.float32
... )
>>> found["device"], found["dtype"]
('cpu', 'float32')
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from besa.model.checkpoint import Checkpoint
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
