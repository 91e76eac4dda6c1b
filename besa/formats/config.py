"""What `config.json` says of packed weights: its `quantization_config`. Needs no torch.

>>> config = PackedConfig("int8", group_size=64)
>>> config.to_dict()["format_version"]
1
>>> PackedConfig.from_dict(config.to_dict()) == config
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from besa.errors import BesaError
from besa.kernels.abi import GROUP_SIZES, WHOLE

QUANT_METHOD = "besa"
FORMAT_VERSION = 3
VALUES = ("bfloat16", "float16", "float32", "int8", "int4")


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
        experts: whether experts of mixtures are among them.
    """

    values: str
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    int8_input: bool = True
    pattern: str = "unstructured"
    experts: bool = False

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
        """The least version of the format that knows such weights."""
        return 3 if self.experts else 2 if self.values == "int4" else 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PackedConfig:
        """Reads what `to_dict` made.

        Raises:
            BesaError: another method, a version of the format that this besa does not know, or a
                value that cannot be.
        """
        if config.get("quant_method") != QUANT_METHOD:
            raise BesaError(f"quantized by {config.get('quant_method')!r}, not {QUANT_METHOD!r}")
        version = config.get("format_version")
        if type(version) is not int or version not in range(1, FORMAT_VERSION + 1):
            newer = isinstance(version, int) and version > FORMAT_VERSION
            todo = "upgrade besa" if newer else "export the model again"
            raise BesaError(
                f"the packed format is version {version!r}, and this besa reads versions "
                f"1 to {FORMAT_VERSION}: {todo}"
            )
        ignore, group_size = config.get("ignore") or [], config.get("group_size")
        if not isinstance(ignore, list | tuple) or not all(isinstance(x, str) for x in ignore):
            raise BesaError("ignore of quantization_config is no list of names")
        if group_size is not None and type(group_size) is not int:
            raise BesaError(f"group_size {group_size!r} is none of {GROUP_SIZES}")
        try:
            return cls(
                values=config["values"],
                ignore=tuple(ignore),
                group_size=group_size,
                int8_input=bool(config.get("int8_input", True)),
                pattern=str(config.get("pattern", "unstructured")),
                experts=bool(config.get("experts", False)),
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
