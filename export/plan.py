"""What a packed checkpoint will hold: which linears are packed, which stay dense, and why.

>>> plan = plan_packing(Checkpoint.open("path/to/pruned"), ExportConfig(out="sparse"))
>>> plan.packed[0].name, plan.packed[0].density, plan.pattern
('model.layers.0.self_attn.q_proj', 0.5, 'unstructured')

The weights are read once for it, block by block, before anything is written. So a model that is
not pruned, a disk that is too small and the config of the result are known at the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.export.config import ExportConfig
from besa.export.weights import PATTERNS, WORTH, nonzeros_and_patterns
from besa.model.blocks import Linear, expert_count, find_linears
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import DenseLinear
from besa.model.files import open_tensors
from besa.model.finite import check_finite
from besa.progress import Event, Tell

# What a packed linear stands for.
_PRODUCTS = (nn.Linear.forward, Conv1D.forward)

# Outputs that tell how a module multiplies.
_OUTPUTS = 8

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedLinear:
    """A linear that is worth packing.

    Attributes:
        key: the stored name of its weight ("model.layers.0.mlp.up_proj.weight").
        kind: its name within a block ("mlp.up_proj").
        block: the block's index.
        rows, cols: its outputs and inputs.
        transposed: whether the weight is stored [inputs, outputs].
        dtype: of the stored weight.
        nonzeros: weights that are not zero.
        patterns: the members of `PATTERNS` that it keeps to.
    """

    key: str
    kind: str
    block: int
    rows: int
    cols: int
    transposed: bool
    dtype: torch.dtype
    nonzeros: int
    patterns: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def density(self) -> float:
        return self.nonzeros / (self.rows * self.cols)

    @property
    def dense_bytes(self) -> int:
        return self.rows * self.cols * self.dtype.itemsize

    def packed_bytes(self, quantize: str | None, group_size: int | None) -> int:
        """Of all its parts in a file; about, if whole numbers: some weights round to zero."""
        bits = {None: 8 * self.dtype.itemsize, "int8": 8, "int4": 4}[quantize]
        size = self.nonzeros * bits // 8
        size += self.rows * (-(-self.cols // 8) + 4)
        groups = -(-self.cols // group_size) if group_size else 1
        if quantize == "int8":
            size += 4 * self.rows * groups
        elif quantize == "int4":
            size += self.rows * (4 + groups)
        return size

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored weight as a view [out, in]."""
        return stored.mT if self.transposed else stored


@dataclass(frozen=True)
class PackingPlan:
    """What becomes of a model's linears.

    Attributes:
        packed: in the model's order; all of one dtype, which is `dtype`.
        dense: the other linears of the blocks.
        ignore: all linears of the model that stay dense, under each of their names.
        pattern: "unstructured", or the N:M that all packed linears keep to.
    """

    packed: tuple[PackedLinear, ...]
    dense: tuple[DenseLinear, ...]
    ignore: tuple[str, ...]
    pattern: str
    dtype: torch.dtype

    def of_block(self, index: int) -> list[PackedLinear]:
        """The packed linears of a block."""
        return [linear for linear in self.packed if linear.block == index]


def plan_packing(
    checkpoint: Checkpoint,
    config: ExportConfig,
    tell: Tell = lambda event: None,
) -> PackingPlan:
    """Reads every linear of the blocks and decides which are packed.

    Raises:
        BesaError: the model is not pruned, a weight is missing, of another shape than the config
            says, or holds NaN or Inf.
    """
    candidates: list[PackedLinear] = []
    dense: list[DenseLinear] = []
    for index in range(len(checkpoint.blocks)):
        packable, rest = _read_block(checkpoint, index)
        candidates += packable
        dense += rest
        what = f"{checkpoint.blocks_name}.{index}"
        tell(Event("reading", what=what, done=index + 1, total=len(checkpoint.blocks)))
    _check_pruned(checkpoint, candidates, dense)
    dtype, _ = Counter(linear.dtype for linear in candidates).most_common(1)[0]
    packed = []
    for linear in candidates:
        reason = _reason_to_stay_dense(linear, dtype, config)
        if reason is None:
            packed.append(linear)
        else:
            dense.append(
                DenseLinear(
                    name=linear.name,
                    kind=linear.kind,
                    bytes=linear.dense_bytes,
                    reason=reason,
                    density=linear.density,
                )
            )
    common = [name for name in PATTERNS if all(name in linear.patterns for linear in packed)]
    return PackingPlan(
        packed=tuple(packed),
        dense=tuple(dense),
        ignore=_ignored(checkpoint, {linear.key for linear in packed}),
        pattern=common[0] if common else "unstructured",
        dtype=dtype,
    )


def _reason_to_stay_dense(
    linear: PackedLinear, dtype: torch.dtype, config: ExportConfig
) -> str | None:
    """Why a linear that could be packed is not; None if it is."""
    if linear.dtype != dtype:
        return f"stored as {_short(linear.dtype)}, most others as {_short(dtype)}"
    packed_bytes = linear.packed_bytes(config.quantize, config.group_size)
    if packed_bytes >= WORTH * linear.dense_bytes:
        return "too few zeros to gain by"
    return None


def _read_block(checkpoint: Checkpoint, index: int) -> tuple[list[PackedLinear], list[DenseLinear]]:
    """The linears of a block: those that can be packed, and those that cannot."""
    block, block_name = checkpoint.blocks[index], f"{checkpoint.blocks_name}.{index}"
    experts = expert_count(checkpoint.config)
    # A linear that besa cannot prune stays as it is: another tool may have pruned the others.
    linears = find_linears(block, block_name, experts, strict=False)
    keys, converted = _stored(checkpoint, checkpoint.block_keys[index])
    routed, lent = expert_lists(block, experts), set(checkpoint.borrowed.values())
    packable: list[PackedLinear] = []
    dense: list[DenseLinear] = []
    with open_tensors(checkpoint.files, checkpoint.block_keys[index]) as slices:
        for linear in linears:
            parameter = f"{block_name}.{linear.parameter}"
            key = keys.get(parameter)
            reason = _obstacle(key)
            if parameter in checkpoint.borrowed:
                continue  # it is in the block that lends it
            if linear.groups > 1 or linear.name.startswith(routed):
                reason = "experts are not packed yet"
            elif key in lent:
                reason = "several blocks share it"
            elif not _is_product(block.get_submodule(linear.name)):
                reason = "its module multiplies in a way of its own"
            elif key is None and _owner(parameter) not in converted:
                raise BesaError(f"{checkpoint.directory} lacks the weight {parameter}")
            if key is not None and reason is None:
                weight = slices[key][...]
                if weight.shape != block.get_parameter(linear.parameter).shape:
                    raise BesaError(
                        f"{checkpoint.directory}: {key} has another shape than config.json says"
                    )
                if weight.dtype in _FLOATS:
                    packable.append(_packable(linear, key, index, weight))
                    continue
                reason = f"stored as {_short(weight.dtype)}"
            name = f"{block_name}.{linear.name}" if key is None else key.removesuffix(".weight")
            size = linear.size * checkpoint.dtype.itemsize
            dense.append(DenseLinear(name=name, kind=linear.name, bytes=size, reason=reason or ""))
    return packable, dense


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


def _obstacle(key: str | None) -> str | None:
    """Why a weight that is stored as `key` cannot be packed; None if nothing speaks against it."""
    if key is None:
        return "its file holds it in another form, cut up or fused"
    if not key.endswith(".weight"):
        return f"its file calls it {key}, not ….weight"
    return None


def _packable(linear: Linear, key: str, block: int, weight: Tensor) -> PackedLinear:
    check_finite(weight, key, "mend the checkpoint")
    nonzeros, patterns = nonzeros_and_patterns(weight.mT if linear.transposed else weight)
    return PackedLinear(
        key=key,
        kind=linear.name,
        block=block,
        rows=linear.rows,
        cols=linear.cols,
        transposed=linear.transposed,
        dtype=weight.dtype,
        nonzeros=nonzeros,
        patterns=patterns,
    )


def _stored(checkpoint: Checkpoint, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """The stored tensor that each parameter is, and the modules that are made of others' parts."""
    own, converted = {}, set()
    for key in keys:
        target = checkpoint.targets[key]
        if key in checkpoint.converted:
            converted.add(_owner(target))
        else:
            own[target] = key
    return own, converted


def _owner(parameter: str) -> str:
    """The module around a linear: of "self_attn.q_proj.weight", "self_attn"."""
    return parameter.rsplit(".", 2)[0]


def expert_lists(block: nn.Module, experts: int | None) -> tuple[str, ...]:
    """The names in a block, each with its dot, of lists that hold one module per expert."""
    return tuple(
        f"{name}."
        for name, module in block.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == experts
    )


def _check_pruned(
    checkpoint: Checkpoint, candidates: list[PackedLinear], dense: list[DenseLinear]
) -> None:
    if not candidates:
        why = f" ({dense[0].name}: {dense[0].reason})" if dense else ""
        raise BesaError(f"{checkpoint.directory} has no linear that can be packed{why}")
    sparsest = min(candidates, key=lambda linear: linear.density)
    if sparsest.packed_bytes(None, None) >= WORTH * sparsest.dense_bytes:
        raise BesaError(
            f"{checkpoint.directory} is not pruned: no linear has more zeros than the "
            f"{1 - sparsest.density:.1%} of {sparsest.name}; run `besa prune` first"
        )


def _ignored(checkpoint: Checkpoint, packed: Collection[str]) -> tuple[str, ...]:
    """All linears that stay dense, in the blocks and elsewhere, under each of their names."""
    model = checkpoint.model
    experts = expert_count(checkpoint.config)
    keys, _ = _stored(checkpoint, checkpoint.files)
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(p.ndim == 3 and len(p) == experts for p in own.values()):
            names[name] = None
        elif isinstance(module, nn.Linear | Conv1D):
            key = keys.get(f"{name}.weight", f"{name}.weight")
            if key not in packed:
                names[key.removesuffix(".weight")] = None
                names[name] = None
    return tuple(names)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
