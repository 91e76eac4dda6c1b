"""Makes `import besa` all that transformers needs to load packed checkpoints.

>>> import besa
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("path/to/sparse")

transformers looks a checkpoint's `quant_method` up in dictionaries of its own, and has no entry
point that would fill them. To fill them takes transformers and torch, whose import takes seconds
that `import besa` must not cost those who need neither. So besa registers at once where these
dictionaries are there already, and otherwise at the end of the import that brings them: whichever
of the two packages is imported first, transformers knows besa.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from besa.errors import BesaWarning

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Now if transformers' registry is there, else as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Waits for one import, to do something after it; finds nothing itself."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """A transformers that besa does not fit is no reason for its own import to fail."""
    try:
        import besa.serve.transformers.quantizer  # noqa: F401
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"transformers will not load besa's packed checkpoints: {error}",
            BesaWarning,
            stacklevel=2,
        )
