"""Which weights of a block can be packed, and why the others cannot.

>>> packable, dense = read_block(Checkpoint.open("path/to/pruned"), 0)
>>> packable[0].name, packable[0].density
('model.layers.0.self_attn.q_proj', 0.5)

A weight of the model need not be one of the files: experts that the model has in a stack may be
stored one by one. It is what is stored that is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.export.weights import nonzeros_and_patterns
from besa.model.blocks import Linear, expert_count, find_linears
from besa.model.checkpoint import Checkpoint
from besa.model.expert_function import function_of
from besa.model.expert_parts import parts_of
from besa.model.export_record import DenseLinear
from besa.model.files import open_tensors
from besa.model.finite import check_finite
from besa.model.layout import Layout

# What a packed linear stands for.
_PRODUCTS = (nn.Linear.forward, Conv1D.forward)

# Outputs that tell how a module multiplies.
_OUTPUTS = 8

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_SHARED = "several blocks share it"
_OTHER_FORM = "its file holds it in another form, cut up or fused"
_OWN_WAY = "its module multiplies in a way of its own"


@dataclass(frozen=True)
class PackedLinear:
    """A stored weight that can be packed: a linear's, an expert's, or a stack of experts'.

    Attributes:
        key: its stored name ("model.layers.0.mlp.up_proj.weight").
        kind: what it is called within a block ("mlp.up_proj", "mlp.experts.gate_up_proj").
        block: the block's index.
        layout: its rows and columns, and how the file holds them.
        dtype: of the stored weight.
        nonzeros: weights that are not zero.
        patterns: the members of `PATTERNS` that it keeps to.
        experts: the module that holds it with the other experts of its layer, all of which are
            packed or none; None for what is no expert.
    """

    key: str
    kind: str
    block: int
    layout: Layout
    dtype: torch.dtype
    nonzeros: int
    patterns: tuple[str, ...]
    experts: str | None = None

    @property
    def name(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def size(self) -> int:
        return self.layout.rows * self.layout.cols

    @property
    def density(self) -> float:
        return self.nonzeros / self.size

    @property
    def dense_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def packed_bytes(self, quantize: str | None, group_size: int | None) -> int:
        """Of all its parts in a file; about, if whole numbers: some weights round to zero."""
        rows, cols = self.layout.rows, self.layout.cols
        bits = {None: 8 * self.dtype.itemsize, "int8": 8, "int4": 4}[quantize]
        size = self.nonzeros * bits // 8
        size += rows * (-(-cols // 8) + 4)
        groups = -(-cols // group_size) if group_size else 1
        if quantize == "int8":
            size += 4 * rows * groups
        elif quantize == "int4":
            size += rows * (4 + groups)
        return size


def read_block(checkpoint: Checkpoint, index: int) -> tuple[list[PackedLinear], list[DenseLinear]]:
    """The weights of a block that can be packed, and its linears that cannot.

    Raises:
        BesaError: a weight is missing, of another shape than the config says, or holds NaN or Inf.
    """
    block, block_name = checkpoint.blocks[index], f"{checkpoint.blocks_name}.{index}"
    block_keys = checkpoint.block_keys[index]
    experts = expert_count(checkpoint.config)
    # A linear that besa cannot prune stays as it is: another tool may have pruned the others.
    linears = {
        parameter: linear
        for linear in find_linears(block, block_name, experts, strict=False)
        # One that is borrowed is in the block that lends it.
        if (parameter := f"{block_name}.{linear.parameter}") not in checkpoint.borrowed
    }
    packable: list[PackedLinear] = []
    dense: list[DenseLinear] = []
    with open_tensors(checkpoint.files, block_keys) as slices:
        stored = _stored_experts(checkpoint, block_keys, linears, slices)
        stored |= _stored_linears(checkpoint, block_keys, linears, slices)
        lists = expert_lists(block, experts)
        for parameter, linear in linears.items():
            tensors, obstacle = stored[parameter]
            if obstacle is not None:
                name = next(iter(tensors)) if len(tensors) == 1 else parameter
                dense.append(
                    DenseLinear(
                        name=name.removesuffix(".weight"),
                        kind=linear.name,
                        bytes=linear.size * checkpoint.dtype.itemsize,
                        reason=obstacle,
                    )
                )
                continue
            layer = next((name[:-1] for name in lists if linear.name.startswith(name)), "")
            if _is_stack(checkpoint, parameter):
                layer = _owner(linear.parameter)
            for key, layout in tensors.items():
                weight = layout.matrix(slices[key][...])
                check_finite(weight, key, "mend the checkpoint")
                nonzeros, patterns = nonzeros_and_patterns(weight)
                packable.append(
                    PackedLinear(
                        key=key,
                        kind=linear.name,
                        block=index,
                        layout=layout,
                        dtype=weight.dtype,
                        nonzeros=nonzeros,
                        patterns=patterns,
                        experts=f"{block_name}.{layer}" if layer else None,
                    )
                )
    return packable, dense


# The stored tensors that a weight of the model is made of, and why they cannot be packed, or None.
_Stored = tuple[dict[str, Layout], str | None]


def _stored_linears(
    checkpoint: Checkpoint,
    block_keys: list[str],
    linears: Mapping[str, Linear],
    slices: Mapping[str, Any],
) -> dict[str, _Stored]:
    """What the files have of each linear of a block."""
    keys, converted = stored_names(checkpoint, block_keys)
    lent = set(checkpoint.borrowed.values())
    stored: dict[str, _Stored] = {}
    for parameter, linear in linears.items():
        if _is_stack(checkpoint, parameter):
            continue
        key = keys.get(parameter)
        layout = Layout(linear.groups * linear.rows, linear.cols, linear.transposed)
        tensors = {} if key is None else {key: layout}
        obstacle = None
        if key in lent:
            obstacle = _SHARED
        elif not _is_product(checkpoint.model.get_submodule(_owner(parameter))):
            obstacle = _OWN_WAY
        elif key is None:
            if _owner(_owner(parameter)) not in converted:
                raise BesaError(f"{checkpoint.directory} lacks the weight {parameter}")
            obstacle = _OTHER_FORM
        elif not key.endswith(".weight"):
            obstacle = f"its file calls it {key}, not ….weight"
        elif tuple(slices[key].get_shape()) != layout.shape:
            raise BesaError(
                f"{checkpoint.directory}: {key} has another shape than config.json says"
            )
        stored[parameter] = tensors, obstacle or _no_floats(tensors, slices)
    return stored


def _stored_experts(
    checkpoint: Checkpoint,
    block_keys: list[str],
    linears: Mapping[str, Linear],
    slices: Mapping[str, Any],
) -> dict[str, _Stored]:
    """What the files have of each stack of experts; an obstacle to one is one to its layer."""
    stacks = {
        parameter: linear
        for parameter, linear in linears.items()
        if _is_stack(checkpoint, parameter)
    }
    parts = parts_of(stacks, block_keys, checkpoint.model, checkpoint.conversions)
    tensors = {
        name: {part.key: part.layout for part in found or ()} for name, found in parts.items()
    }
    obstacles: dict[str, str | None] = {
        owner: None
        if function_of(checkpoint.model.get_submodule(owner))
        else "its module is none of experts that besa knows to compute"
        for owner in dict.fromkeys(map(_owner, stacks))
    }
    lent = set(checkpoint.borrowed.values())
    for parameter, own in tensors.items():
        obstacle = obstacles[_owner(parameter)] or _no_floats(own, slices)
        if own.keys() & lent:
            obstacle = _SHARED
        elif not own or any(tuple(slices[k].get_shape()) != own[k].shape for k in own):
            obstacle = _OTHER_FORM
        obstacles[_owner(parameter)] = obstacle
    return {parameter: (tensors[parameter], obstacles[_owner(parameter)]) for parameter in stacks}


def _is_stack(checkpoint: Checkpoint, parameter: str) -> bool:
    """Whether a weight is of experts that the model holds in a stack."""
    return checkpoint.model.get_parameter(parameter).ndim == 3


def _no_floats(tensors: Iterable[str], slices: Mapping[str, Any]) -> str | None:
    """Why tensors that are stored as something else cannot be packed."""
    dtypes = [slices[key][:0].dtype for key in tensors]
    return next((f"stored as {short(each)}" for each in dtypes if each not in _FLOATS), None)


def _is_product(module: nn.Module) -> bool:
    """Whether a linear is x W^T + b: one that multiplies in a way of its own needs its weight.

    A class with a forward of its own is asked by random numbers, on a skeleton as on a real module,
    for a few outputs.
    """
    if type(module).forward in _PRODUCTS:
        return True
    if not isinstance(module, nn.Linear):
        return False
    chance = torch.Generator().manual_seed(0)
    real = {
        name: torch.randn(parameter[:_OUTPUTS].shape, generator=chance)
        for name, parameter in module.named_parameters()
    }
    if not {"weight"} <= real.keys() <= {"weight", "bias"}:
        return False
    x = torch.randn(2, module.in_features, generator=chance)
    expected = F.linear(x, real["weight"], real.get("bias"))
    try:
        with torch.no_grad():
            found = functional_call(module, real, (x,))
    except Exception:  # noqa: BLE001 - what another shape raises is its own affair
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def stored_names(checkpoint: Checkpoint, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """The stored tensor that each parameter is, and the modules that are made of others' parts."""
    own, converted = {}, set()
    for key in keys:
        target = checkpoint.targets[key]
        if key in checkpoint.converted:
            converted.add(_owner(_owner(target)))
        else:
            own[target] = key
    return own, converted


def _owner(name: str) -> str:
    """The module that holds a parameter or a module: of "mlp.up_proj.weight", "mlp.up_proj"."""
    return name.rpartition(".")[0]


def expert_lists(block: nn.Module, experts: int | None) -> tuple[str, ...]:
    """The names in a block, each with its dot, of lists that hold one module per expert."""
    return tuple(
        f"{name}."
        for name, module in block.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == experts
    )


def short(dtype: torch.dtype) -> str:
    """As users write it."""
    return str(dtype).removeprefix("torch.")
