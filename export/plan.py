"""What a packed checkpoint will hold: which linears are packed, which stay dense, and why.

>>> plan = plan_packing(Checkpoint.open("path/to/pruned"), ExportConfig(out="sparse"))
>>> plan.packed[0].name, plan.packed[0].density, plan.pattern
('model.layers.0.self_attn.q_proj', 0.5, 'unstructured')

The weights are read once for it, block by block, before anything is written. So a model that is
not pruned, a disk that is too small and the config of the result are known at the start.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.export.config import ExportConfig
from besa.export.packable import PackedLinear, read_block, short, stored_names
from besa.export.weights import PATTERNS, WORTH
from besa.model.blocks import expert_count
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import DenseLinear
from besa.progress import Event, Tell


@dataclass(frozen=True)
class PackingPlan:
    """What becomes of a model's linears.

    Attributes:
        packed: in the model's order.
        dense: the other linears of the blocks.
        ignore: all linears of the model that stay dense, under each of their names.
        pattern: "unstructured", or the N:M that all packed linears keep to.
        dtype: of the packed linears.
    """

    packed: tuple[PackedLinear, ...]
    dense: tuple[DenseLinear, ...]
    ignore: tuple[str, ...]
    pattern: str
    dtype: torch.dtype

    @property
    def experts(self) -> bool:
        """Whether experts of mixtures are packed."""
        return any(linear.experts is not None for linear in self.packed)

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
        packable, rest = read_block(checkpoint, index)
        candidates += packable
        dense += rest
        what = f"{checkpoint.blocks_name}.{index}"
        tell(Event("reading", what=what, done=index + 1, total=len(checkpoint.blocks)))
    _check_pruned(checkpoint, candidates, dense)
    dtype, _ = Counter(linear.dtype for linear in candidates).most_common(1)[0]
    packed = []
    for group in _together(candidates):
        reason = _reason_to_stay_dense(group, dtype, config)
        if reason is None:
            packed += group
        else:
            dense += [_dense(linear, reason) for linear in group]
    common = [name for name in PATTERNS if all(name in linear.patterns for linear in packed)]
    return PackingPlan(
        packed=tuple(packed),
        dense=tuple(dense),
        ignore=_ignored(checkpoint, packed),
        pattern=common[0] if common else "unstructured",
        dtype=dtype,
    )


def _together(candidates: list[PackedLinear]) -> list[list[PackedLinear]]:
    """What is packed or not: each linear by itself, and all experts of a layer."""
    groups: dict[str, list[PackedLinear]] = {}
    for linear in candidates:
        groups.setdefault(linear.experts or linear.key, []).append(linear)
    return list(groups.values())


def _reason_to_stay_dense(
    group: list[PackedLinear], dtype: torch.dtype, config: ExportConfig
) -> str | None:
    """Why linears that could be packed are not; None if they are."""
    for linear in group:
        if linear.dtype != dtype:
            return f"stored as {short(linear.dtype)}, most others as {short(dtype)}"
    packed = sum(linear.packed_bytes(config.quantize, config.group_size) for linear in group)
    if packed >= WORTH * sum(linear.dense_bytes for linear in group):
        return "too few zeros to gain by"
    return None


def _dense(linear: PackedLinear, reason: str) -> DenseLinear:
    """The record of a linear that could be packed and is not."""
    return DenseLinear(
        name=linear.name,
        kind=linear.kind,
        bytes=linear.dense_bytes,
        reason=reason,
        density=linear.density,
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


def _ignored(checkpoint: Checkpoint, packed: Collection[PackedLinear]) -> tuple[str, ...]:
    """All linears that stay dense, in the blocks and elsewhere, under each of their names."""
    model = checkpoint.model
    count = expert_count(checkpoint.config)
    keys, _ = stored_names(checkpoint, checkpoint.files)
    weights, experts = {x.key for x in packed}, {x.experts for x in packed}
    # Where experts are stored one by one, what the files call their list.
    lists = {
        checkpoint.targets[key].rpartition(".")[0]: stored[1]
        for key in checkpoint.files
        if (stored := re.fullmatch(r"(.+)\.\d+\.\w+\.weight", key))
    }
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(p.ndim == 3 and len(p) == count for p in own.values()):
            names |= {} if name in experts else {lists.get(name, name): None, name: None}
        elif isinstance(module, nn.Linear | Conv1D):
            key = keys.get(f"{name}.weight", f"{name}.weight")
            if key not in weights:
                names[key.removesuffix(".weight")] = None
                names[name] = None
    return tuple(names)
