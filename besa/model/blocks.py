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
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError


@dataclass(frozen=True)
class Linear:
    """One prunable weight of a block: `groups` matrices of `rows` outputs by `cols` inputs.

    An ordinary linear is one group; fused experts are one group per expert, and a linear in which
    each part of the outputs reads inputs of its own is one group per part. `transposed` weights are
    stored [inputs, outputs], as GPT-2 does.
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
        matrix = stored if stored.ndim == 3 else stored.unflatten(0, (self.groups, -1))
        return matrix.mT if self.transposed else matrix

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A [groups, rows, cols] tensor in the shape and layout of the parameter `like`."""
        return (matrix.mT if self.transposed else matrix).reshape(like.shape)


# What configs call the number of routed experts.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def expert_count(config: Any) -> int | None:
    """The number of routed experts a config speaks of, under any of its usual names."""
    config = config.get_text_config()
    for name in EXPERT_COUNTS:
        if isinstance(count := getattr(config, name, None), int):
            return count
    return None


# What configs call the number of experts that a token goes to.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def experts_per_token(config: Any) -> int | None:
    """How many of the routed experts a token goes to; all where the config does not say.

    None without experts.
    """
    count = expert_count(config)
    if not count:
        return None
    text = config.get_text_config()
    return min(count, next((n for name in _CHOSEN if (n := getattr(text, name, None))), count))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The text decoder's blocks: of its module lists, the one that holds the most parameters.

    Returns:
        The list's name in the model and the list.
    """
    lists = _lists(model, "", _text_config(model), inside=False)
    if not lists:  # a model of one part, or one that does not say which part is for text
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    filled = [entry for entry in lists if len(entry[1])]
    if not filled:
        raise BesaError(f"{type(model).__name__} has no list of blocks: besa prunes decoders only")
    return max(filled, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))


def _text_config(model: nn.Module) -> type[Any] | None:
    """The class of config that the part of a model for text has."""
    config = getattr(model, "config", None)
    return type(config.get_text_config()) if isinstance(config, PreTrainedConfig) else None


def _lists(
    module: nn.Module, name: str, text: type[Any] | None, inside: bool
) -> list[tuple[str, nn.ModuleList]]:
    """The module lists of the parts of a model that have the config for text, outermost first.

    Vision towers and the like are models of their own inside, with a config of their own.
    """
    if isinstance(module, PreTrainedModel):
        inside = type(module.config) is text
    found = [(name, module)] if inside and isinstance(module, nn.ModuleList) else []
    for child_name, child in module.named_children():
        found += _lists(child, f"{name}.{child_name}" if name else child_name, text, inside)
    return found


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
    counts = {n for module in block.modules() for n in _expert_counts(module)}
    counts |= {experts} if experts else set()
    for module_name, module in block.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{parameter_name}" if module_name else parameter_name
            if exclude and re.search(exclude, f"{block_name}.{full}"):
                continue
            if isinstance(module, nn.Linear | Conv1D):
                transposed = isinstance(module, Conv1D)
                if parameter_name != "weight":
                    continue
                groups = _row_groups(module)
                rows, cols = parameter.shape[::-1] if transposed else parameter.shape
                narrow = min(rows // groups, cols) < _NARROW
                if not narrow and not _is_router(block, module_name, rows, counts):
                    linears.append(
                        Linear(module_name, full, groups, rows // groups, cols, transposed)
                    )
            elif isinstance(module, nn.Embedding | _ConvNd):
                continue
            elif parameter.ndim == 3 and len(parameter) in counts:
                linears.append(replace(stacked(module, parameter_name), name=full, parameter=full))
            elif parameter.ndim > 2 or (parameter.ndim == 2 and not _is_gate(parameter, counts)):
                unknown[full] = parameter.numel()
    size = sum(p.numel() for p in block.parameters())
    large = [name for name, count in unknown.items() if count > size / 100]
    if large and strict:
        raise BesaError(
            f"{block_name}.{large[0]} belongs to a {type(block).__name__} module that besa does "
            f"not know how to prune; leave it dense with --exclude '{'|'.join(large)}'"
        )
    return linears


def stacked(module: nn.Module, name: str) -> Linear:
    """The experts that a module holds in a parameter [experts, out, in] or [experts, in, out]."""
    shape, transposed = module.get_parameter(name).shape, is_transposed(module)
    rows, cols = shape[:0:-1] if transposed else shape[1:]
    return Linear(name, name, shape[0], rows, cols, transposed)


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module says that it holds.

    Shared experts, or experts that only hand their inputs on, are not in the config's number.
    """
    return {n for name, n in vars(module).items() if name.endswith("experts") and type(n) is int}


def _is_gate(parameter: Tensor, counts: set[int]) -> bool:
    """Whether a matrix outside of a linear gates, routes or decays: a few numbers, or experts."""
    return min(parameter.shape) < _NARROW or len(parameter) in counts


def _row_groups(module: nn.Module) -> int:
    """Into how many parts a linear's outputs fall that each read inputs of their own.

    Such a block-diagonal linear has a product of its own in place of `nn.Linear`'s.
    """
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    groups = getattr(module, "n_groups", 1) if own else 1
    return groups if isinstance(groups, int) and groups > 0 else 1


def is_transposed(module: nn.Module) -> bool:
    """Whether stacked experts are stored [experts, inputs, outputs].

    transformers marks most of them. Of others the shapes tell: the first projection reads as many
    features as the last one gives.
    """
    marked = getattr(module, "is_transposed", None)
    if marked is not None:
        return bool(marked)
    stacks = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3]
    if len(stacks) < 2:
        return False
    (_, a, b), (_, c, d) = stacks[0], stacks[-1]
    # [outputs, inputs] twice: b = c, and what lies between is a whole number of times d.
    return not (b == c and a % d == 0) and a == d and b % c == 0


def _is_router(block: nn.Module, name: str, rows: int, counts: set[int]) -> bool:
    """Whether a linear has one output per expert and lives beside the experts.

    It may be in a module of its own there.
    """
    if rows not in counts:
        return False
    parent = name.rpartition(".")[0]
    around = parent.rpartition(".")[0]
    return _holds_experts(block.get_submodule(parent), rows) or (
        bool(around) and _holds_experts(block.get_submodule(around), rows)
    )


def _holds_experts(place: nn.Module, count: int) -> bool:
    """Whether `count` experts, stacked or in a list, are among a module's parts."""
    return any(p.ndim == 3 and len(p) == count for p in place.parameters()) or any(
        isinstance(m, nn.ModuleList) and len(m) == count for m in place.modules()
    )
