"""Packed experts in vLLM: what is behind a mixture's own router.

As for linears, no parameter of a known shape can take a packed weight. Parts of each source weight,
of one expert or of all of a layer's, are kept until all are there (`take`, which
besa.serve.vllm.weights calls). Then the rows and columns of this rank are cut out: of its experts
where the ranks share those out, else of its part of each expert, gate by gate and projection by
projection. After loading, a layer has one packed weight before the activation and one after it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
)
from vllm.model_executor.utils import set_weight_attrs

from besa.errors import BesaError
from besa.formats import FormatError, Packed, PackedConfig, packed_of
from besa.formats.checkpoint import suffixes_of
from besa.formats.slicing import stack_rows, take_columns, take_rows
from besa.kernels.experts import Activation, Weight, sparse_experts

# vLLM's activations: what its own kernels compute by these names.
_ACTIVATIONS = {
    MoEActivation.SILU: Activation("silu"),
    MoEActivation.GELU: Activation("gelu"),
    MoEActivation.GELU_TANH: Activation("gelu_tanh"),
    MoEActivation.SWIGLUOAI: Activation(
        "silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0
    ),
}

_TRANSFORMERS = "serve the model by `--engine transformers`"

# vLLM's names of a layer's two weights, and what is held of each.
_MATRICES = ("w13", "w2")
_HELD = ("values", "bitmask", "row_ptr", "scale", "steps")

# What vLLM's models call a weight of all experts in one.
_STACKED = {"gate_up_proj": "w13", "w13_weight": "w13", "down_proj": "w2", "w2_weight": "w2"}


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """A layer's experts, whose weights are packed on disk and in memory."""

    def __init__(self, config: PackedConfig, layer: RoutedExperts, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.config, self.prefix, self.suffixes = config, prefix, suffixes_of(config)
        self.activation = _activation(layer, prefix)
        _refuse(layer, prefix)
        # Of the parts of each source weight, while they arrive.
        self.sources: dict[tuple[int | None, str], dict[str, Tensor]] = defaultdict(dict)
        # This rank's rows of each matrix, by the expert and by their place within it.
        self.pieces: dict[str, dict[tuple[int, int], Packed]] = {name: {} for name in _MATRICES}
        self.whole: dict[str, Packed] = {}  # each matrix, once all of its pieces are there

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Registers biases, which are dense; the packed weights come by `take`."""
        self.experts, self.hidden = num_experts, hidden_size
        self.inner, self.dtype = intermediate_size_per_partition, params_dtype
        # How many rows of each matrix are still to come.
        self.missing = {"w13": num_experts * 2 * self.inner, "w2": num_experts * hidden_size}
        self.device = torch.empty(0).device  # vLLM makes that of the model the default
        if self.device.type == "cuda" and not get_current_vllm_config().model_config.enforce_eager:
            raise BesaError(
                f"{self.prefix} is packed, and cannot be part of a CUDA graph: serve the model "
                "with --enforce-eager"
            )
        self.places = layer.expert_map
        # Of one expert's weights: the matrix that it is of, and whether it is the second one there.
        self.names = {
            layer.ckpt_gate_proj_name: ("w13", 0),
            layer.ckpt_up_proj_name: ("w13", 1),
            layer.ckpt_down_proj_name: ("w2", 0),
        }
        if self.activation.interleaved:  # no gates apart from projections up
            self.names.clear()
        for name, width in (("w13_bias", 2 * self.inner), ("w2_bias", hidden_size)):
            bias = None
            if self.moe.has_bias:
                bias = Parameter(
                    torch.zeros(num_experts, width, dtype=params_dtype), requires_grad=False
                )
                set_weight_attrs(bias, attributes)
            layer.register_parameter(name, bias)

    def take(self, expert: int | None, weight: str, suffix: str, tensor: Tensor) -> bool:
        """Takes one part of a source; with the last one, cuts out what this rank needs of it."""
        if weight not in (_STACKED if expert is None else self.names):
            return False
        parts = self.sources[expert, weight]
        parts[suffix] = tensor
        if set(self.suffixes) <= set(parts):
            try:
                self._cut(expert, weight, parts)
            except FormatError as error:
                raise FormatError(f"{self.prefix}: {error}") from None
            del self.sources[expert, weight]
        return True

    def _cut(self, expert: int | None, weight: str, parts: dict[str, Tensor]) -> None:
        """Keeps this rank's part of a source, in memory of its own."""
        matrix, slot = (_STACKED[weight], 0) if expert is None else self.names[weight]
        numbers = range(self.moe.num_experts) if expert is None else [expert]
        # Of w13 a source has rows of a gate and of a projection up, or of one of them.
        halves = 2 if expert is None else 1
        inner = self.inner * self.moe.tp_size
        rows, columns = (halves * inner, self.hidden) if matrix == "w13" else (self.hidden, inner)
        packed = packed_of(
            lambda name: parts.get(name.removeprefix(weight)), weight, columns, self.config
        )
        if len(packed.bitmask) != len(numbers) * rows:
            found, expected = list(packed.shape), [len(numbers) * rows, columns]
            raise FormatError(f"{weight} is {found}, but config.json makes it {expected}")
        cut = [
            piece
            for index, number in enumerate(numbers)
            if self._place(number) >= 0
            for piece in self._own(matrix, _run(packed, index * rows, rows), halves)
        ]
        if cut:
            place = 0 if expert is None else self._place(expert)
            piece = self.pieces[matrix][place, slot] = stack_rows(cut)
            self.missing[matrix] -= len(piece.bitmask)
            if not self.missing[matrix]:
                self._join(matrix)

    def _join(self, matrix: str) -> None:
        """Makes one weight of a matrix's pieces.

        As soon as all are there, so that no more than one layer is in memory twice: after the whole
        model was loaded, its pieces would leave gaps in the heap as large as itself.
        """
        pieces = self.pieces[matrix]
        ordered = [pieces[place] for place in sorted(pieces)]
        self.whole[matrix] = ordered[0] if len(ordered) == 1 else stack_rows(ordered)
        pieces.clear()

    def _place(self, expert: int) -> int:
        """Where this rank has an expert; -1 if another one has it."""
        return expert if self.places is None else int(self.places[expert])

    def _own(self, matrix: str, packed: Packed, halves: int) -> list[Packed]:
        """The part of one expert's weight that this rank multiplies by."""
        if matrix == "w2":
            start = self.moe.tp_rank * self.inner
            return [take_columns(packed, start, start + self.inner)]
        if self.activation.interleaved:  # a gate and its projection up are neighbours
            size = halves * self.inner
            return [_run(packed, self.moe.tp_rank * size, size)]
        half = len(packed.bitmask) // halves
        starts = (number * half + self.moe.tp_rank * self.inner for number in range(halves))
        return [_run(packed, start, self.inner) for start in starts]

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Registers the packed weights."""
        for (expert, weight), parts in self.sources.items():
            name = weight if expert is None else f"{expert}.{weight}"
            lacks = ", ".join(name + part for part in self.suffixes if part not in parts)
            raise BesaError(f"the checkpoint lacks {lacks} of {self.prefix}")
        for matrix in _MATRICES:
            if matrix not in self.whole:
                raise BesaError(f"the checkpoint does not hold {self.prefix} whole")
            packed = self.whole.pop(matrix).to(self.device)
            if packed.values.is_floating_point():  # the type that the engine runs the model in
                packed = replace(packed, values=packed.values.to(self.dtype))
            for name in _HELD:
                tensor = getattr(packed, name)
                kept = None if tensor is None else Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"{matrix}_{name}", kept)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:  # noqa: ARG002
        return FUSED_MOE_UNQUANTIZED_CONFIG  # vLLM's own kernels are not used

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,  # noqa: ARG002 - vLLM runs them before
        shared_experts_input: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """The weighted sum of what the experts of this rank make of each token."""
        if (places := layer.expert_map) is not None:
            topk_ids = places[topk_ids.long()]
        w13, w2 = (
            Weight(*(getattr(layer, f"{matrix}_{name}") for name in (*_HELD, "bias")))
            for matrix in _MATRICES
        )
        return sparse_experts(
            x,
            w13,
            w2,
            topk_ids,
            topk_weights,
            self.activation,
            w13.bias,
            w2.bias,
            self.config.int8_input,
            layer.apply_router_weight_on_input,
        )


def _run(packed: Packed, start: int, size: int) -> Packed:
    """So many rows of a weight, from `start` on; a view."""
    return take_rows(packed, torch.arange(start, start + size))


def _activation(layer: RoutedExperts, prefix: str) -> Activation:
    """What a layer's experts do between their two products."""
    activation = layer.moe_config.activation
    numbers = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
    if activation not in _ACTIVATIONS or any(number is not None for number in numbers):
        own = " with numbers of its own" if activation in _ACTIVATIONS else ""
        raise BesaError(
            f"{prefix}: besa has no kernel in vLLM for packed experts with the activation "
            f"{activation.value}{own}: {_TRANSFORMERS}"
        )
    return _ACTIVATIONS[activation]


def _refuse(layer: RoutedExperts, prefix: str) -> None:
    """Raises a BesaError for what vLLM may ask of experts, and packed ones have not."""
    if layer.moe_config.moe_parallel_config.enable_eplb:
        raise BesaError(f"{prefix} is packed, and cannot be moved: serve it without --enable-eplb")
    if layer.moe_config.is_lora_enabled:
        raise BesaError(f"{prefix} is packed, and vLLM's LoRA does not take it: {_TRANSFORMERS}")
