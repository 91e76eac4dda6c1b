"""The model builder of ONNX Runtime GenAI: a checkpoint as a graph of its fused operators.

>>> build(Path("path/to/pruned"), Path("onnx"), precision="int8")
>>> sorted(path.name for path in Path("onnx").glob("*.onnx*"))
['model.onnx', 'model.onnx.data']

It knows some two dozen architectures by name. Besides the graph and its data it writes
`genai_config.json` and the tokenizer.

The builder is a script with a folder of modules beside it: importing it puts that folder on
`sys.path`, where `builders` and `quantization` are anyone's names. Here they are taken off again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from besa.errors import BesaError
from besa.export.onnx.runtime import genai
from besa.model.architecture import read_config

MODEL, DATA = "model.onnx", "model.onnx.data"


class GraphError(BesaError):
    """There is no graph of that kind for a model, or it is another model's: another kind may be."""


def build(
    source: Path,
    out: Path,
    precision: str,
    change: Callable[[ir.Model], None] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> None:
    """Writes the graph of a checkpoint to `out`.

    Args:
        precision: fp32, int8 and int4 for CPUs; fp16, bf16 and int4 for NVIDIA GPUs.
        change: is given the graph, an onnx_ir.Model, before it is written.
        device: "cpu" or "cuda", ONNX Runtime's execution provider.
        trust_remote_code: whether code that lies beside the checkpoint may run.

    Raises:
        GraphError: the builder does not know the architecture, or failed.
    """
    cache = out / "cache"
    arguments = ("", str(source), str(out), precision, device, str(cache))
    with (
        _builder() as (builder, base),
        _changed(base, change, read_config(source, trust_remote_code)),
        _known(source),
    ):
        # A local folder needs no token, and must not look for one. Layers that look at a window
        # only keep all of their cache: the other form is for GenAI's own loop alone.
        options = ["hf_token=false", "windowed_kv_cache=false"]
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
    if cache.is_dir():
        shutil.rmtree(cache)


@contextmanager
def _known(source: Path) -> Iterator[None]:
    """Turns whatever the builder raises inside into one line; a reason is there if it knows one."""
    what = f"ONNX Runtime GenAI's builder has no graph for {source}"
    try:
        yield
    except BesaError:
        raise
    except NotImplementedError as error:
        reason = (str(error).strip() or "it knows no such model").splitlines()[0].rstrip(".")
        raise GraphError(f"{what}: {reason}") from None
    except Exception:  # noqa: BLE001 - of many kinds, whose words are for the builder's authors
        raise GraphError(what) from None


@contextmanager
def _builder() -> Iterator[tuple[Any, Any]]:
    """The builder and the module of its models, with nothing printed."""
    genai()
    path = list(sys.path)
    quiet = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            try:
                from onnxruntime_genai.models import builder
            except ImportError as error:
                raise BesaError(
                    f"the model builder needs {error.name}: pip install 'besa[onnx]'"
                ) from None
            yield builder, sys.modules[builder.Model.__module__]
    finally:
        logging.disable(level)
        sys.path[:] = path


@contextmanager
def _changed(base: Any, change: Callable[[ir.Model], None] | None, config: Any) -> Iterator[None]:
    """The builder's models as besa needs them.

    Graphs are changed before they are written. And where a config has a window but no list of
    layers, all layers have it: the builder would give it to none.
    """
    save_model, is_local = base.Model.save_model, base.Model.is_local

    def save(model: Any, out: str) -> None:
        if change is not None:
            change(model.model)
        save_model(model, out)

    everywhere = bool(getattr(config, "sliding_window", None)) and not getattr(
        config, "layer_types", None
    )
    base.Model.save_model = save
    base.Model.is_local = lambda model, layer: everywhere or is_local(model, layer)
    try:
        yield
    finally:
        base.Model.save_model, base.Model.is_local = save_model, is_local
