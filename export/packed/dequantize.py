"""Weights that another tool quantized, as transformers makes them floats: fp8, mxfp4 and so on.

Such files come out as the tensors of the model, under the names that it gives them. transformers
dequantizes whole models, so that one is in memory here, in its own dtype.

>>> _floats({"model.norm.weight": Path("path/to/model/model.safetensors")})
{'model.norm.weight'}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError, one_line
from besa.model.checkpoint import Checkpoint
from besa.model.files import open_tensors, stored_shapes, weight_files
from besa.model.loading import whole_model
from besa.model.quantization import drop_notes
from besa.model.quiet import quiet

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A model on disk, as `PackedCheckpoint` is one of besa's own.

    Attributes:
        directory: where it is.
        tensors: what the plain checkpoint will hold.
        weights: the names of those that were quantized.
        skeleton: the model that they make, as if `tensors` were stored.
    """

    directory: Path
    tensors: dict[str, Tensor]
    weights: frozenset[str]
    skeleton: Checkpoint

    @classmethod
    def of(
        cls, directory: Path, config: Any, method: Any, trust_remote_code: bool
    ) -> QuantizedCheckpoint:
        """The model in a directory, with this config; it is dequantized at once.

        Args:
            method: transformers' config for how it was quantized, see
                `besa.model.quantization.dequantizing`.

        Raises:
            BesaError: transformers cannot.
        """
        files = weight_files(directory)
        _check_blocks(directory, files, dict(config.quantization_config))
        declared = getattr(config.get_text_config(), "dtype", None)
        with quiet(), one_line(f"transformers cannot turn {directory} into floats"):
            loaded = whole_model(
                directory,
                trust_remote_code,
                dtype=declared or torch.bfloat16,
                quantization_config=method(dequantize=True),
            )
        drop_notes(config)
        tied = getattr(loaded, "all_tied_weights_keys", {})  # stored once, under the other name
        tensors = {name: each for name, each in loaded.state_dict().items() if name not in tied}
        # A tensor that is in no file has any of them: what counts is which names there are.
        plain = {name: files.get(name, next(iter(files.values()))) for name in tensors}
        skeleton = Checkpoint.of(directory, config, plain, trust_remote_code)
        return cls(directory, tensors, frozenset(tensors) - _floats(files), skeleton)

    def check_digests(self) -> None:
        """Nothing says what its files should be."""

    def dense(self, name: str) -> Tensor:
        """A tensor of the plain checkpoint."""
        return self.tensors[name].contiguous()

    @property
    def dense_bytes(self) -> int:
        """What the plain checkpoint takes on the disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _check_blocks(directory: Path, files: dict[str, Path], notes: dict[str, Any]) -> None:
    """Raises a BesaError for blocks that a matrix is no multiple of.

    transformers tells a block's size from how many scales there are, so that the scales of such a
    matrix would go to other numbers than theirs.
    """
    block = notes.get("weight_block_size")
    if not block:
        return
    for name, shape in stored_shapes(files).items():
        if f"{name}_scale_inv" not in files:
            continue
        if any(size > b and size % b for size, b in zip(shape[-2:], block, strict=True)):
            raise BesaError(
                f"{directory}: transformers cannot turn {name} into floats, as its shape "
                f"{list(shape)} is no multiple of its blocks {list(block)}: take the float model"
            )


def _floats(files: dict[str, Path]) -> set[str]:
    """The stored tensors that are floats of 16 bits or more."""
    with open_tensors(files, list(files)) as tensors:
        return {name for name, tensor in tensors.items() if tensor.get_dtype() in _FLOATS}
