"""besa's version, and the versions that a result depends on, for every floor of the package."""

from __future__ import annotations

import platform

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """The versions of besa, of Python and of the libraries that read, compute and write weights."""
    import safetensors
    import torch
    import transformers

    return {
        "besa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
