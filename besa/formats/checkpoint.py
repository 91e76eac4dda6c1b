"""Packed weights in a Hugging Face directory: what writers and readers agree on.

`config.json` has a `quantization_config` (`PackedConfig`). In the safetensors shards each packed
linear has, in place of `NAME.weight`,

    NAME.weight_values     [nonzeros]              the nonzeros, row by row
    NAME.weight_bitmask    uint8 [out, ceil(in/8)] where they are, little-endian bits
    NAME.weight_rows       int32 [out]             0, 1, …, out - 1
    NAME.weight_scale      float32 [out, groups]   with int8 values; [out, 1] with int4
    NAME.weight_steps      uint8 [out, groups]     with int4 values only

in one file, and always [out, in], also where the model stores the weight as [in, out]. Other
tensors are as they were. int4 values are two a byte, uint8 [bytes], as besa.kernels.nibbles says;
they came with version 2 of the format, and a checkpoint without them is of version 1. Row pointers
are rebuilt at load. `weight_rows` costs 4 bytes a row and lets an engine slice, fuse and reorder
rows by its own rules, as it does with any tensor of one number per row, and say afterwards which
rows it took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.formats.packed import FormatError, Packed
from besa.kernels.abi import GROUP_SIZES, WHOLE

QUANT_METHOD = "besa"
FORMAT_VERSION = 2
VALUES = ("bfloat16", "float16", "float32", "int8", "int4")

# What is appended to the name of a weight.
SUFFIXES = ("_values", "_bitmask", "_rows", "_scale", "_steps")


@dataclass(frozen=True)
class PackedConfig:
    """The `quantization_config` of a packed checkpoint.

    Attributes:
        values: what the values are stored as, one of `VALUES`.
        ignore: the linears that are stored dense, by name: as the files spell it, and as the
            model does where that differs. Of fused experts, the module that holds them.
        group_size: for int8 and int4, how many columns share a scale, or for int4 a
            step; None if the whole row does.
        int8_input: for int8 and int4, whether activations are quantized to int8 too, per token.
        pattern: "unstructured", or the N:M that all packed linears keep to.
    """

    values: str
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    int8_input: bool = True
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise BesaError(f"values {self.values!r} is none of {', '.join(VALUES)}")
        if self.group_size not in (None, *GROUP_SIZES):
            raise BesaError(f"group_size {self.group_size!r} is none of {GROUP_SIZES}")
        if self.group_size is not None and self.values not in WHOLE:
            raise BesaError(f"group_size is for int8 and int4 values, not {self.values}")

    @property
    def has_scale(self) -> bool:
        """Whether values are whole numbers times a scale."""
        return self.values in WHOLE

    @property
    def format_version(self) -> int:
        """The least version of the format that knows such values."""
        return 2 if self.values == "int4" else 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PackedConfig:
        """Reads what `to_dict` made.

        Raises:
            BesaError: another method, or a version of the format that this besa does not know.
        """
        if config.get("quant_method") != QUANT_METHOD:
            raise BesaError(f"quantized by {config.get('quant_method')!r}, not {QUANT_METHOD!r}")
        version = config.get("format_version")
        if version not in range(1, FORMAT_VERSION + 1):
            newer = isinstance(version, int) and version > FORMAT_VERSION
            todo = "upgrade besa" if newer else "export the model again"
            raise BesaError(
                f"the packed format is version {version!r}, and this besa reads versions "
                f"1 to {FORMAT_VERSION}: {todo}"
            )
        try:
            return cls(
                values=config["values"],
                ignore=tuple(config.get("ignore") or ()),
                group_size=config.get("group_size"),
                int8_input=bool(config.get("int8_input", True)),
                pattern=str(config.get("pattern", "unstructured")),
            )
        except KeyError as error:
            raise BesaError(f"quantization_config lacks {error.args[0]!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        fields = asdict(self)
        fields["ignore"] = list(self.ignore)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "format": "bitmask",
            **fields,
        }


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


def packed_weights(names: Mapping[str, Any] | list[str]) -> list[str]:
    """The names of the packed weights among stored tensors, in their order."""
    return [name.removesuffix("_values") for name in names if name.endswith(".weight_values")]
