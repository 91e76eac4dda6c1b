"""Packed linears in vLLM.

A packed weight has as many values as it has nonzeros, so no parameter of a known shape can take
it. Each linear registers empty placeholders instead. Their loaders keep the parts of a source
weight until all of them are there. vLLM's own loader of that layer then tells which rows this rank
holds, and where: `weight_rows` goes through it like any tensor with one number for each row. So
fused projections, tensor parallelism and replicated heads stay vLLM's business. The columns of
row-parallel layers are found the same way. After loading, the parts of a layer become one packed
weight. A layer whose weights all came dense becomes one of vLLM's own: vLLM has linears where the
checkpoint's list of dense ones knows none, such as routers, or has another name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from besa.errors import BesaError
from besa.formats import FormatError, Packed, PackedConfig, pack, packed_of
from besa.formats.checkpoint import SUFFIXES, suffixes_of
from besa.formats.int4 import in_eight_bits
from besa.formats.slicing import stack_rows, take_columns, take_rows
from besa.kernels.cuda import linear as gpu
from besa.kernels.cuda.records import Records, fitting
from besa.kernels.linear import INT4

_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int8")}
_DTYPES["int4"] = INT4


@dataclass
class _Source:
    """One weight of the checkpoint, while its parts arrive: `q_proj` of a `qkv_proj`."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    slots: Tensor | None = None  # the rows of the layer that it fills
    own: Packed | Tensor | None = None  # those rows; a tensor if they are stored dense


def _turn(parts: dict[str, Tensor], heads: int) -> None:
    """Turns the rows of a packed source, of which vLLM has turned no more than the scale."""
    if "weight" in parts:  # dense, so that it is turned already
        return
    order = parts["weight_rows"].view(heads, -1, 2).mT.flatten()
    parts["weight_rows"] = order
    if "weight_scale" in parts:
        parts["weight_scale"] = parts["weight_scale"][order.long().argsort()]


def _first_slot(source: _Source) -> int:
    return int(source.slots[0]) if source.slots is not None and len(source.slots) else -1


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear, fused or not, whose weights are packed on disk and in memory."""

    def __init__(self, config: PackedConfig, prefix: str, turned_heads: Mapping[str, int]) -> None:
        """Of the layer `prefix`.

        Args:
            turned_heads: of which shards vLLM turns the rows of what is called a weight or its
                scale, from pairs of neighbours to two halves, and how many heads they have.
        """
        self.config, self.prefix, self.turned_heads = config, prefix, turned_heads
        self.sources: dict[str, _Source] = {}
        self.records: Records | None = None  # of a GPU's kernels; the layer holds its tensors

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002 - vLLM passes it by name
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Registers a placeholder for each tensor that the checkpoint may hold of this layer."""
        self.loader: Callable[..., None] = attributes["weight_loader"]
        self.columns = (input_size_per_partition, input_size)
        self.rows = sum(output_partition_sizes)
        self.dtype = params_dtype
        values = _DTYPES[self.config.values]
        placeholders = {
            "weight_values": torch.empty(0, dtype=values),
            "weight_bitmask": torch.empty(0, dtype=torch.uint8),
            "weight_rows": torch.empty(self.rows, dtype=torch.int32),
            "weight": torch.empty(0, dtype=params_dtype),
        }
        if self.config.has_scale:
            placeholders["weight_scale"] = torch.empty(0)
        if self.config.values == "int4":
            placeholders["weight_steps"] = torch.empty(0, dtype=torch.uint8)
        for name, tensor in placeholders.items():
            parameter = Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": partial(self._load_part, name)})
            if name in ("weight_rows", "weight"):  # a model may reorder rows before it loads them
                set_weight_attrs(parameter, {"output_dim": 0})

    def _load_part(self, name: str, _: Parameter, loaded: Tensor, *shard: Any, **more: Any) -> None:
        """Takes one part of a source; with the last one, packs what this rank needs of it."""
        source = self.sources.setdefault(repr((shard, more)), _Source())
        source.parts[name] = loaded
        if name == "weight":  # stored dense, beside others of the layer that are packed
            source.parts["weight_rows"] = torch.arange(len(loaded), dtype=torch.int32)
        wanted = {f"weight{suffix}" for suffix in suffixes_of(self.config)}
        if "weight" not in source.parts and not wanted <= set(source.parts):
            return
        if heads := self.turned_heads.get(shard[0] if shard else ""):
            _turn(source.parts, heads)
        rows = self._on_this_rank(0, source.parts["weight_rows"], self.rows, *shard, **more)
        source.slots = (rows >= 0).nonzero()[:, 0]
        own, (start, end) = rows[source.slots], self._own_columns()
        if "weight" in source.parts:
            source.own = source.parts["weight"][own, start:end]
        else:
            whole = take_rows(self._packed_source(source.parts), own)
            source.own = take_columns(whole, start, end)
        source.own = source.own.clone()  # so that the checkpoint's file does not stay mapped
        source.parts.clear()

    def _packed_source(self, parts: dict[str, Tensor]) -> Packed:
        """The source as the checkpoint has it, checked."""
        try:
            return packed_of(lambda name: parts.get(name), "weight", self.columns[1], self.config)
        except FormatError as error:
            raise FormatError(f"{self.prefix}: {error}") from None

    def _own_columns(self) -> tuple[int, int]:
        """The columns of a row-parallel layer's rank, from and to; all of them elsewhere."""
        own, every = self.columns
        if own == every:
            return 0, every
        columns = self._on_this_rank(None, torch.arange(every, dtype=torch.int32), own)
        return int(columns[0]), int(columns[-1]) + 1

    def _on_this_rank(
        self, output_dim: int | None, numbers: Tensor, size: int, *shard: Any, **more: Any
    ) -> Tensor:
        """Which of `numbers` vLLM's loader gives to this rank: int64 [size], -1 where none."""
        probe = Parameter(torch.full((size,), -1, dtype=torch.int32), requires_grad=False)
        attributes = {"output_dim": 0} if output_dim is not None else {"input_dim": 0}
        set_weight_attrs(probe, attributes)
        self.loader(probe, numbers, *shard, **more)
        return probe.data.long()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Makes one weight of the parts that were loaded: packed, unless all of them are dense."""
        device = layer.get_parameter("weight_rows").device
        pieces = self._pieces()
        dense = [piece for piece in pieces if isinstance(piece, Tensor)]
        if len(dense) == len(pieces):
            self._make_unquantized(layer, torch.cat(dense).to(device, self.dtype))
            return
        whole = stack_rows([self._packed_piece(piece) for piece in pieces])
        with fitting(whole, whole.in_features, device):
            packed = whole.to(device)
            if packed.values.is_floating_point():  # the type that the engine runs the model in
                packed = replace(packed, values=packed.values.to(self.dtype))
            if gpu.usable(device, packed.values.dtype):
                if packed.steps is not None:  # a GPU's kernels have eight bits
                    packed = in_eight_bits(packed)
                self.records = gpu.records_of(
                    packed, packed.in_features, self.dtype, self.config.int8_input
                )
        self._drop_placeholders(layer)
        # LoRA looks for a weight of the first one's name to learn the device.
        tensors: dict[str, Tensor | None]
        if self.records is not None:
            tensors = {"weight_packed": self.records.data, "weight_offsets": self.records.offsets}
        else:
            tensors = {
                "weight_packed": packed.values,
                "weight_bitmask": packed.bitmask,
                "weight_row_ptr": packed.row_ptr,
            }
        tensors |= {"weight_scale": packed.scale, "weight_steps": packed.steps}
        for name, tensor in tensors.items():
            kept = None if tensor is None else Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, kept)

    def _pieces(self) -> list[Packed | Tensor]:
        """The rows of the sources, in the order in which they fill the layer."""
        slots, pieces = [], []
        for source in sorted(self.sources.values(), key=_first_slot):
            if source.slots is None or source.own is None:
                missing = {"weight_values", "weight_bitmask", "weight_rows"} - set(source.parts)
                raise BesaError(f"the checkpoint lacks {', '.join(missing)} of {self.prefix}")
            if len(source.slots):
                slots.append(source.slots)
                pieces.append(source.own)
        if not slots or not torch.equal(torch.cat(slots), torch.arange(self.rows)):
            raise BesaError(f"the checkpoint does not hold {self.prefix} whole")
        self.sources.clear()
        return pieces

    def _packed_piece(self, piece: Packed | Tensor) -> Packed:
        """A piece as it is, or packed if it is dense, beside others that are packed."""
        if isinstance(piece, Packed):
            return piece
        if self.config.has_scale:
            raise BesaError(
                f"{self.prefix} is fused of {self.config.values} and of dense weights: export "
                "the model with all of its parts packed, or all dense"
            )
        return pack(piece.to(_DTYPES[self.config.values]))

    def _make_unquantized(self, layer: nn.Module, weight: Tensor) -> None:
        """Has vLLM's own method multiply from now on."""
        self._drop_placeholders(layer)
        layer.register_parameter("weight", Parameter(weight, requires_grad=False))
        method = UnquantizedLinearMethod()
        method.process_weights_after_loading(layer)
        layer.quant_method = method

    def _drop_placeholders(self, layer: nn.Module) -> None:
        for name in (*(f"weight{suffix}" for suffix in SUFFIXES), "weight"):
            if hasattr(layer, name):
                delattr(layer, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        if self.records is not None:
            held: Any = layer  # for mypy a module's attribute may be a module
            here = replace(self.records, data=held.weight_packed, offsets=held.weight_offsets)
            return gpu.records_linear(x, here, held.weight_scale, bias, self.config.int8_input)
        result: Tensor = torch.ops.besa.sparse_linear(
            x,
            layer.weight_packed,
            layer.weight_bitmask,
            layer.weight_row_ptr,
            layer.weight_scale,
            bias,
            self.config.int8_input,
            layer.weight_steps,
        )
        return result
