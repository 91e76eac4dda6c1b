"""What the export's tests share: models with zeros, and packed weights read with numpy alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tests.helpers import random_model, save_with_tokenizer, stored

Choose = Callable[[str], bool]


def in_a_block(name: str) -> bool:
    return re.search(r"\b(layers|h|blocks)\.\d+\.", name) is not None


@torch.no_grad()
def put_zeros(
    model: Any,
    rate: float = 0.5,
    pattern: tuple[int, int] | None = None,
    where: Choose = in_a_block,
) -> Any:
    """Zeros in all matrices of the blocks that `where` chooses, -0.0 among them.

    Args:
        pattern: (n, m): n of every m neighbours along the inputs are kept.
    """
    generator = torch.Generator().manual_seed(0)
    turned = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not where(name):
            continue
        weight = parameter.mT if name in turned else parameter
        noise = torch.rand(weight.shape, generator=generator)
        if pattern:
            n, m = pattern
            ranks = noise.unflatten(-1, (-1, m)).argsort(-1).argsort(-1).flatten(-2)
            gone = ranks >= n
        else:
            gone = noise < rate
        weight[gone] = 0.0
        weight[gone & (noise > 0.4) & (noise < 0.42)] = -0.0
    return model


def pruned_model(family: str, directory: Path, tiny_model: Path, **changes: Any) -> Path:
    """A family's tiny model with half of its blocks' weights gone."""
    return save_with_tokenizer(put_zeros(random_model(family, **changes)), directory, tiny_model)


def bits_of(tensor: Tensor) -> np.ndarray:
    """As unsigned integers of its size."""
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(kinds[tensor.element_size()]).reshape(tensor.shape)


def unpacked_bits(tensors: dict[str, Tensor], weight: str, cols: int) -> np.ndarray:
    """A packed weight's values in their places, by the format's words: [out, in], as integers."""
    mask = np.unpackbits(tensors[f"{weight}_bitmask"].numpy(), axis=1, bitorder="little")
    assert not mask[:, cols:].any()
    dense = np.zeros((len(mask), cols), bits_of(tensors[f"{weight}_values"]).dtype)
    dense[mask[:, :cols].astype(bool)] = bits_of(tensors[f"{weight}_values"])
    return dense


def packed_names(tensors: dict[str, Tensor]) -> set[str]:
    """The packed weights of a checkpoint, each with all of its parts."""
    names = {key.removesuffix("_values") for key in tensors if key.endswith("_values")}
    for name in names:
        rows = tensors[f"{name}_rows"]
        assert torch.equal(rows, torch.arange(len(rows), dtype=torch.int32))
        assert tensors[f"{name}_bitmask"].dtype == torch.uint8
        assert name not in tensors
    return names


def quantization(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return dict(config["quantization_config"])


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Every tensor under its name, bit for bit, -0.0 as +0.0."""
    mine, other = stored(ours), stored(theirs)
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        wanted = other[key]
        if tensor.is_floating_point():
            wanted = torch.where(wanted == 0, torch.zeros_like(wanted), wanted)
            tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
        assert tensor.dtype == wanted.dtype, key
        assert np.array_equal(bits_of(tensor), bits_of(wanted)), key
