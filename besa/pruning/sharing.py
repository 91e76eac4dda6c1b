"""What processes that share a pruning run must have in common, and what they cannot share.

>>> from besa.processes.ranks import ALONE
>>> check_shareable(PruneConfig(out="pruned", effort="high"), ALONE)  # one process can do all
>>> check_alike({"model_fingerprint": "8c1f", "threads": 2}, ALONE)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from besa.errors import BesaError, BesaWarning
from besa.processes.ranks import Ranks
from besa.pruning import methods
from besa.pruning.batches import windows_at_once
from besa.pruning.config import PruneConfig
from besa.pruning.record import resumable


def check_shareable(config: PruneConfig, ranks: Ranks) -> None:
    """Raises a BesaError if the settings ask for what only one process can do."""
    if ranks.size > 1 and config.effort == "high" and config.quantize is None:
        raise BesaError(
            "--effort high trains the pruned model as a whole, in one process: give --effort "
            "medium here, and then `besa recover` without torchrun"
        )


def check_alike(settings: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises a BesaError if processes, on several machines, are about to do different things.

    Args:
        settings: of this process, `besa.pruning.record.settings_of`.
    """
    ours, *others = [resumable(each) for each in ranks.gather(dict(settings))]
    for rank, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != ours[name]:
                raise BesaError(
                    f"process {rank} has {name} = {value}, and process 0 {ours[name]}: give all "
                    "machines the same model, text and versions"
                )


def warn_of_idle(config: PruneConfig, tokens: int, ranks: Ranks) -> None:
    """Says so where a step of learning has too few samples for all processes.

    Args:
        tokens: in a sample.
    """
    learns = methods.load(config.method).targets or config.update in ("auto", "learn")
    step = config.step_samples or windows_at_once(tokens)
    if not learns or step % ranks.size == 0:
        return
    enough = ranks.size * -(-step // ranks.size)
    warnings.warn(
        f"{ranks.size} processes share steps of {step} sample{'s' * (step > 1)}, so that some wait "
        f"while masks and weights are learned: --step-samples {enough} keeps all at work, and "
        "learns in fewer steps",
        BesaWarning,
        stacklevel=2,
    )
