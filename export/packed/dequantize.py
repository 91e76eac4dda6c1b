"""Weights that another tool quantized, as transformers makes them floats: fp8, mxfp4 and so on.

Such files come out as the tensors of the model, under the names that it gives them. transformers
dequantizes whole models, so that one is in memory here, in its own dtype.

>>> QuantizedCheckpoint.open("path/to/model")
Traceback (most recent call last):
besa.errors.BesaError: path/to/model is not quantized: it is a plain checkpoint already
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from besa.errors import BesaError, one_line
from besa.model.architecture import loader_of, read_config
from besa.model.checkpoint import Checkpoint
from besa.model.files import open_tensors, resolve, weight_files
from besa.model.loading import quiet
from besa.model.quantization import NOTES, dequantizing, stored_as

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
    def open(cls, model: str | Path, trust_remote_code: bool = False) -> QuantizedCheckpoint:
        """Opens a directory or hub id, and dequantizes it.

        Raises:
            BesaError: transformers cannot.
        """
        directory = resolve(model)
        config = read_config(directory, trust_remote_code)
        stored = stored_as(vars(config))
        if stored.method is None:
            raise BesaError(f"{directory} is not quantized: it is a plain checkpoint already")
        method = dequantizing(stored.method)
        if method is None:
            raise BesaError(f"transformers cannot turn {stored.method} weights into floats")
        files = weight_files(directory)
        _check_blocks(directory, files, dict(config.quantization_config))
        loaded = _loaded(directory, config, method, trust_remote_code)
        for name in NOTES:
            vars(config).pop(name, None)
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


def _loaded(directory: Path, config: Any, method: Any, trust_remote_code: bool) -> Any:
    """The model with float weights, every one of them from the files."""
    declared = getattr(config.get_text_config(), "dtype", None)
    with quiet(), one_line(f"transformers cannot turn {directory} into floats"):
        loaded: Any  # with output_loading_info, a pair
        loaded = loader_of(config, trust_remote_code).from_pretrained(
            directory,
            dtype=declared or torch.bfloat16,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            quantization_config=method(dequantize=True),
        )
        model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise BesaError(f"{directory} lacks {len(missing)} weights of the model, as {missing[0]}")
    return model


def _check_blocks(directory: Path, files: dict[str, Path], notes: dict[str, Any]) -> None:
    """Raises a BesaError for blocks that a matrix is no multiple of.

    transformers tells a block's size from how many scales there are, so that the scales of such a
    matrix would go to other numbers than theirs.
    """
    block = notes.get("weight_block_size")
    if not block:
        return
    scaled = [name for name in files if f"{name}_scale_inv" in files]
    with open_tensors(files, scaled) as tensors:
        for name, tensor in tensors.items():
            shape = tensor.get_shape()
            if any(size > b and size % b for size, b in zip(shape[-2:], block, strict=True)):
                raise BesaError(
                    f"{directory}: transformers cannot turn {name} into floats, as its shape "
                    f"{shape} is no multiple of its blocks {list(block)}: take the float model"
                )


def _floats(files: dict[str, Path]) -> set[str]:
    """The stored tensors that are floats of 16 bits or more."""
    names = set()
    for path in set(files.values()):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                if opened.get_slice(name).get_dtype() in _FLOATS:
                    names.add(name)
    return names
