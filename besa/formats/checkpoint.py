"""Packed weights in a Hugging Face directory: what writers and readers agree on.

`config.json` has a `quantization_config` (`PackedConfig`). In the safetensors shards each packed
linear has, in place of `NAME.weight`,

    NAME.weight_values     [nonzeros]              the nonzeros, row by row
    NAME.weight_bitmask    uint8 [out, ceil(in/8)] where they are, little-endian bits
    NAME.weight_rows       int32 [out]             0, 1, …, out - 1
    NAME.weight_scale      float32 [out, groups]   with int8 values; [out, 1] with int4
    NAME.weight_steps      uint8 [out, groups]     with int4 values only

in one file, and always [out, in], also where the model stores the weight as [in, out]. Other
tensors are as they were. int4 values are two a byte, uint8 [bytes], as besa.kernels.nibbles says.
Row pointers are rebuilt at load. `weight_rows` costs 4 bytes a row and lets an engine slice, fuse
and reorder rows by its own rules, as it does with any tensor of one number per row, and say
afterwards which rows it took.

Experts of a mixture are stored as they were: one by one, `experts.3.up_proj.weight` like any other
linear; or stacked, `experts.gate_up_proj` [experts, out, in] as one weight [experts * out, in]:

    NAME_values, NAME_bitmask, NAME_rows, ...      of the rows of expert 0, of expert 1, ...

int4 came with version 2 of the format, experts with version 3; a checkpoint has the least version
that knows all that is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from besa.formats.config import PackedConfig
from besa.formats.packed import FormatError, Packed
from besa.kernels.linear import INT4

# What is appended to the name of a weight: what is there of each, and what some types need.
_ALWAYS = ("_values", "_bitmask", "_rows")
SUFFIXES = (*_ALWAYS, "_scale", "_steps")


def suffixes_of(config: PackedConfig) -> tuple[str, ...]:
    """What is appended to the name of each packed weight of a checkpoint.

    >>> suffixes_of(PackedConfig("int8"))
    ('_values', '_bitmask', '_rows', '_scale')
    """
    scale = ("_scale",) if config.has_scale else ()
    return (*_ALWAYS, *scale, *(("_steps",) if config.values == "int4" else ()))


def tensors_of(packed: Packed, weight: str) -> dict[str, Tensor]:
    """What a file holds of a packed weight named `weight` ("….q_proj.weight")."""
    tensors = {
        weight + "_values": packed.values,
        weight + "_bitmask": packed.bitmask,
        weight + "_rows": torch.arange(
            len(packed.bitmask), dtype=torch.int32, device=packed.values.device
        ),
    }
    for name, part in (("_scale", packed.scale), ("_steps", packed.steps)):
        if part is not None:
            tensors[weight + name] = part
    return tensors


def packed_of(
    read: Callable[[str], Tensor | None], weight: str, in_features: int, config: PackedConfig
) -> Packed:
    """The packed weight that a file holds under the name `weight`, checked.

    Args:
        read: gives a stored tensor by its name, or None.

    Raises:
        FormatError: a part is missing, or they do not fit together.
    """
    values, bitmask = read(weight + "_values"), read(weight + "_bitmask")
    for name, part in (("_values", values), ("_bitmask", bitmask)):
        if part is None:
            raise FormatError(f"{weight}{name} is missing")
    assert values is not None
    assert bitmask is not None
    kind = INT4 if config.values == "int4" else getattr(torch, config.values)
    if values.dtype != kind:
        raise FormatError(
            f"{weight}_values is {values.dtype}, but config.json says that values are "
            f"{config.values}"
        )
    try:
        return Packed.from_tensors(
            values,
            bitmask,
            in_features,
            read(weight + "_scale"),
            config.group_size,
            read(weight + "_steps"),
        )
    except FormatError as error:
        raise FormatError(f"{weight}: {error}") from None


def packed_weights(names: Collection[str]) -> list[str]:
    """The names of the packed weights among stored tensors, in their order.

    One that is damaged is found by the parts that are left.

    >>> packed_weights(["up.weight_bitmask", "up.weight_values", "norm_values"])
    ['up.weight']
    """
    count = Counter(
        name.removesuffix(suffix) for name in names for suffix in _ALWAYS if name.endswith(suffix)
    )
    return [weight for weight in count if weight.endswith(".weight") or count[weight] > 1]


def parts_in(names: Collection[str]) -> dict[str, str]:
    """The stored tensors that are parts of packed weights, with the weight that each belongs to.

    >>> parts_in(["up.weight_bitmask", "up.weight_values", "norm.weight"])
    {'up.weight_values': 'up.weight', 'up.weight_bitmask': 'up.weight'}
    """
    known = frozenset(names)
    parts = {weight + suffix: weight for weight in packed_weights(names) for suffix in SUFFIXES}
    return {part: weight for part, weight in parts.items() if part in known}
