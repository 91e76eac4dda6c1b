"""What there is to pack: every linear of a decoder's blocks, its zeros, and what packing gains.

    plan = survey(Checkpoint.open("pruned"), ExportConfig(out="sparse"))
    plan.packed[0].density, plan.packed[0].bytes, plan.dense[0].reason, plan.pattern

The weights are read once for it, block by block, before anything is written. So a model that is
not pruned, a disk that is too small and the config of the result are known at the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.export.config import ExportConfig
from besa.kernels.packing import pack_mask
from besa.model.blocks import expert_count, find_linears
from besa.model.checkpoint import Checkpoint
from besa.model.files import open_tensors
from besa.model.finite import check_finite
from besa.progress import Event, Tell

# Packed bytes over dense bytes from which on a linear stays dense (0.84 of bfloat16 weights kept).
# Below, the product's time follows the bytes: 0.82 of the time for 0.81 of them at batch 1.
WORTH = 0.9

# The N:M patterns that hardware and kernels know, the stricter one first.
PATTERNS = ((2, 4), (4, 8))

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedLinear:
    """A linear that is worth packing.

    Attributes:
        key: the stored name of its weight ("model.layers.0.mlp.up_proj.weight").
        kind: its name within a block, the last part if that is enough ("up_proj").
        block: the block's index.
        rows, cols: outputs and inputs.
        transposed: whether the weight is stored [inputs, outputs].
        dtype: of the stored weight.
        nonzeros: weights that are not zero.
        patterns: those of `PATTERNS` that it keeps to.
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
        """Of all its parts in a file; for int8 at most, as some weights round to zero."""
        size = self.nonzeros * (1 if quantize else self.dtype.itemsize)
        size += self.rows * (-(-self.cols // 8) + 4)
        if quantize:
            size += 4 * self.rows * (-(-self.cols // group_size) if group_size else 1)
        return size

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored weight as a view [out, in]."""
        return stored.mT if self.transposed else stored


@dataclass(frozen=True)
class DenseLinear:
    """A linear of a block that stays as it is, and why; `density` where it was counted."""

    name: str
    kind: str
    bytes: int
    reason: str
    density: float | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of a model's linears."""

    packed: tuple[PackedLinear, ...]
    dense: tuple[DenseLinear, ...]
    ignore: tuple[str, ...]
    pattern: str
    dtype: torch.dtype

    def of_block(self, index: int) -> list[PackedLinear]:
        return [linear for linear in self.packed if linear.block == index]


def survey(
    checkpoint: Checkpoint,
    config: ExportConfig,
    tell: Tell = lambda event: None,
) -> Plan:
    """Reads every linear of the blocks and decides which are packed.

    Raises:
        BesaError: the model is not pruned, a weight is missing, of another shape than the config
            says, or holds NaN or Inf.
    """
    candidates: list[PackedLinear] = []
    dense: list[DenseLinear] = []
    for index in range(len(checkpoint.blocks)):
        found, left = _linears_of(checkpoint, index)
        candidates += found
        dense += left
        what = f"{checkpoint.blocks_name}.{index}"
        tell(Event("reading", what=what, done=index + 1, total=len(checkpoint.blocks)))
    _check_pruned(checkpoint, candidates, dense)
    dtype, _ = Counter(linear.dtype for linear in candidates).most_common(1)[0]
    packed = []
    for linear in candidates:
        share = linear.packed_bytes(config.quantize, config.group_size) / linear.dense_bytes
        if linear.dtype != dtype:
            reason = f"stored as {_short(linear.dtype)}, most others as {_short(dtype)}"
        elif share >= WORTH:
            reason = "too few zeros to gain by"
        else:
            packed.append(linear)
            continue
        size = linear.dense_bytes
        dense.append(DenseLinear(linear.name, linear.kind, size, reason, linear.density))
    kept = [name for name in _names(PATTERNS) if all(name in x.patterns for x in packed)]
    return Plan(
        packed=tuple(packed),
        dense=tuple(dense),
        ignore=_ignored(checkpoint, {linear.key for linear in packed}),
        pattern=kept[0] if kept else "unstructured",
        dtype=dtype,
    )


def _linears_of(checkpoint: Checkpoint, index: int) -> tuple[list[PackedLinear], list[DenseLinear]]:
    """The linears of a block: those that can be packed, and those that cannot."""
    block, block_name = checkpoint.blocks[index], f"{checkpoint.blocks_name}.{index}"
    experts = expert_count(checkpoint.config)
    # What besa cannot prune stays as it is, whoever pruned the rest.
    linears = find_linears(block, block_name, experts, strict=False)
    keys, made = _stored(checkpoint, checkpoint.block_keys[index])
    routed = expert_lists(block, experts)
    found: list[PackedLinear] = []
    left: list[DenseLinear] = []
    with open_tensors(checkpoint.files, checkpoint.block_keys[index]) as slices:
        for linear in linears:
            parameter = f"{block_name}.{linear.parameter}"
            key = keys.get(parameter)
            reason = None
            if linear.groups > 1 or linear.name.startswith(routed):
                reason = "experts are not packed yet"
            elif key is None:
                if _owner(parameter) not in made:
                    raise BesaError(f"{checkpoint.directory} lacks the weight {parameter}")
                reason = "its file holds it in another form, cut up or fused"
            elif not key.endswith(".weight"):
                reason = f"its file calls it {key}, not ….weight"
            if reason is None and key is not None:
                weight = slices[key][...]
                if weight.shape != block.get_parameter(linear.parameter).shape:
                    raise BesaError(
                        f"{checkpoint.directory}: {key} has another shape than config.json says"
                    )
                if weight.dtype in _FLOATS:
                    check_finite(weight, key, "mend the checkpoint")
                    matrix = weight.mT if linear.transposed else weight
                    nonzeros, patterns = zeros_of(matrix)
                    found.append(
                        PackedLinear(
                            key=key,
                            kind=linear.name,
                            block=index,
                            rows=linear.rows,
                            cols=linear.cols,
                            transposed=linear.transposed,
                            dtype=weight.dtype,
                            nonzeros=nonzeros,
                            patterns=patterns,
                        )
                    )
                    continue
                reason = f"stored as {_short(weight.dtype)}"
            name = f"{block_name}.{linear.name}" if key is None else key.removesuffix(".weight")
            size = linear.size * checkpoint.dtype.itemsize
            left.append(DenseLinear(name, linear.name, size, reason or ""))
    return found, left


def _stored(checkpoint: Checkpoint, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """The stored tensor that each parameter is, and the modules that are made of others' parts."""
    own, made = {}, set()
    for key in keys:
        target = checkpoint.targets[key]
        if key in checkpoint.converted:
            made.add(_owner(target))
        else:
            own[target] = key
    return own, made


def _owner(parameter: str) -> str:
    """The module around a linear: of "self_attn.q_proj.weight", "self_attn"."""
    return parameter.rsplit(".", 2)[0]


def zeros_of(matrix: Tensor) -> tuple[int, tuple[str, ...]]:
    """The nonzeros of a matrix [out, in] and those of `PATTERNS` that its rows keep to."""
    bits, row_ptr = pack_mask(matrix)
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)  # in each half of a byte, how many of 4
    low, high = nibbles & 0x0F, nibbles >> 4
    fits = {
        (2, 4): bool((low <= 2).all() and (high <= 2).all()),
        (4, 8): bool((low + high <= 4).all()),
    }
    kept = [pattern for pattern in PATTERNS if fits[pattern]]
    return int(row_ptr[-1]), tuple(_names(kept))


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


def _ignored(checkpoint: Checkpoint, packed: set[str]) -> tuple[str, ...]:
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


def _names(patterns: Any) -> list[str]:
    return [f"{n}:{m}" for n, m in patterns]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
