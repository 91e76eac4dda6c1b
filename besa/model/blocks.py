"""A decoder's blocks and their linears, found by type and shape and never by a family's name.

>>> from besa.model.checkpoint import Checkpoint
>>> model = Checkpoint.open("path/to/model").model
>>> name, blocks = find_blocks(model)
>>> name, len(blocks)
('model.layers', 3)
>>> [linear.name for linear in find_linears(blocks[0], name + ".0", expert_count(model.config))]
['self_attn.q_proj', 'self_attn.k_proj', ..., 'mlp.down_proj']

A family that stores its weights in another way has its case in `find_linears`, and there alone: it
says which parameters of a block are matrices to prune, and how they are laid out (`Linear`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError


@dataclass(frozen=True)
class Linear:
    """One prunable weight of a block: `groups` matrices of `rows` outputs by `cols` inputs.

    An ordinary linear is one group; fused experts are one group per expert. `transposed` weights
    are stored [inputs, outputs], as GPT-2 does.
    """

    name: str  # within the block: "self_attn.q_proj", "mlp.experts.down_proj"
    parameter: str  # within the block: "self_attn.q_proj.weight"
    groups: int
    rows: int
    cols: int
    transposed: bool

    @property
    def size(self) -> int:
        return self.groups * self.rows * self.cols

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.cols) if self.groups == 1 else (self.groups, self.rows, self.cols)

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored parameter as a view [groups, rows, cols]."""
        matrix = stored if stored.ndim == 3 else stored.unsqueeze(0)
        return matrix.mT if self.transposed else matrix

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A [groups, rows, cols] tensor in the shape and layout of the parameter `like`."""
        return (matrix.mT if self.transposed else matrix).reshape(like.shape)


def expert_count(config: Any) -> int | None:
    """The number of routed experts a config speaks of, under any of its usual names."""
    config = config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(count := getattr(config, name, None), int):
            return count
    return None


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: of all module lists, the one that holds the most parameters.

    Returns:
        The list's name in the model and the list.
    """
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise BesaError(f"{type(model).__name__} has no list of blocks: besa prunes decoders only")
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    return name, blocks


# A linear with fewer inputs or outputs than this mixes a few streams or gates a few parts: each of
# its weights counts, and all of them together are nothing beside a matrix between features.
_NARROW = 8


def find_linears(
    block: nn.Module,
    block_name: str,
    experts: int | None,
    exclude: str | None = None,
    strict: bool = True,
) -> list[Linear]:
    """The prunable weights of a block, in the order in which the block defines them.

    Routers (one output per expert) are left alone, and so are gates and coefficients (a few inputs
    or outputs), embeddings, norms and convolutions, and what the regular expression `exclude`
    finds in the full name.

    Raises:
        BesaError: names a large weight matrix of a module that besa does not know, if `strict`.
    """
    linears = []
    unknown: dict[str, int] = {}
    for module_name, module in block.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{parameter_name}" if module_name else parameter_name
            if exclude and re.search(exclude, f"{block_name}.{full}"):
                continue
            if isinstance(module, nn.Linear | Conv1D):
                transposed = isinstance(module, Conv1D)
                if parameter_name != "weight":
                    continue
                rows, cols = parameter.shape[::-1] if transposed else parameter.shape
                narrow = min(rows, cols) < _NARROW
                if not narrow and not _is_router(block, module_name, rows, experts):
                    linears.append(Linear(module_name, full, 1, rows, cols, transposed))
            elif isinstance(module, nn.Embedding | _ConvNd):
                continue
            elif parameter.ndim == 3 and parameter.shape[0] == experts:
                transposed = bool(getattr(module, "is_transposed", False))
                rows, cols = parameter.shape[1:] if not transposed else parameter.shape[:0:-1]
                linears.append(Linear(full, full, len(parameter), rows, cols, transposed))
            elif parameter.ndim >= 2 and experts not in parameter.shape[:1]:
                unknown[full] = parameter.numel()
    size = sum(p.numel() for p in block.parameters())
    large = [name for name, count in unknown.items() if count > size / 100]
    if large and strict:
        raise BesaError(
            f"{block_name}.{large[0]} belongs to a {type(block).__name__} module that besa does "
            f"not know how to prune; leave it dense with --exclude '{'|'.join(large)}'"
        )
    return linears


def _is_router(block: nn.Module, name: str, rows: int, experts: int | None) -> bool:
    """Whether a linear has one output per expert and lives beside the experts."""
    if rows != experts:
        return False
    siblings = block.get_submodule(name.rpartition(".")[0])
    return any(p.ndim == 3 and p.shape[0] == experts for p in siblings.parameters()) or any(
        isinstance(m, nn.ModuleList) and len(m) == experts for m in siblings.modules()
    )
