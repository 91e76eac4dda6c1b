"""besa: prune an LLM by blockwise sparsity allocation, pack what is left, serve it faster.

>>> from besa import PruneConfig, prune
>>> result = prune("path/to/model", PruneConfig(out="pruned", sparsity=0.5, samples=16))
>>> print(f"{result.sparsity:.0%} zeros in {result.out}")
50% zeros in pruned
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from besa.errors import BesaError
from besa.registration import register_with_transformers
from besa.version import __version__

if TYPE_CHECKING:
    from besa.pruning.config import PruneConfig
    from besa.pruning.pipeline import PruneResult
    from besa.pruning.run import prune
    from besa.recovery.config import RecoverConfig
    from besa.recovery.keep_zeros import KeepZeros
    from besa.recovery.recover import recover
    from besa.serve.transformers.quantizer import BesaConfig

__all__ = [
    "BesaConfig",
    "BesaError",
    "KeepZeros",
    "PruneConfig",
    "PruneResult",
    "RecoverConfig",
    "__version__",
    "prune",
    "recover",
]


# torch takes seconds to import; `besa --help` should not.
_LAZY = {
    "BesaConfig": "besa.serve.transformers.quantizer",
    "KeepZeros": "besa.recovery.keep_zeros",
    "PruneConfig": "besa.pruning.config",
    "PruneResult": "besa.pruning.pipeline",
    "RecoverConfig": "besa.recovery.config",
    "prune": "besa.pruning.run",
    "recover": "besa.recovery.recover",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'besa' has no attribute {name!r}")


# Loads no more than is loaded already.
register_with_transformers()
