"""A decoder's blocks and their linears, found by type and shape and never by a family's name.

Three steps make any decoder prunable block by block:

- `find_blocks` finds the list of decoder blocks, `find_linears` the weight matrices in one;
- `capture` runs the model around its blocks once and keeps what each block was called with, so
  that a block can be called again, alone, on any hidden states (`Call.run`);
- `observe` sees the inputs of every linear where its weight is used, which works alike for
  `nn.Linear`, GPT-2's `Conv1D` and fused experts (3-D parameters).

    name, blocks = find_blocks(model)
    linears = find_linears(blocks[0], name + ".0", expert_count(model.config))
    hidden, calls = capture(model, blocks, token_batches)
    output = calls[0][0].run(blocks[0], hidden[0])
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
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


# A block returns its hidden states, alone or in front of attention weights and a state.
_MOST_VALUES = 3


@dataclass(frozen=True)
class Call:
    """How the model calls one block: all arguments but the hidden states, verbatim."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states [batch, tokens, width]."""
        output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The same call with its tensors on `device`, floating ones in `dtype`."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        return Call(*pytree.tree_map(move, (self.args, self.kwargs)))


def _same(a: Any, b: Any) -> bool:
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(
        x is y
        or (isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y))
        or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y)
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def capture(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Tensor]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What enters the first block, and how each block is called, for batches of token ids.

    The blocks themselves do not run (their weights may be on the meta device): each hands its
    hidden states on untouched.

    Args:
        batches: int64 token ids [batch, tokens].

    Returns:
        hidden: per batch, the hidden states [batch, tokens, width] that enter block 0.
        calls: `calls[batch][block]`; batches called alike share one `Call`.

    Raises:
        BesaError: the model changes the hidden states between its blocks.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    values = 0
    for tokens in batches:
        reasons: list[str] = []
        while True:
            try:
                first, row = _capture_one(model, blocks, tokens, values)
                break
            except (_HandedOnChanged, TypeError, ValueError, IndexError, AttributeError) as error:
                reasons.append(str(error))
            values += 1  # perhaps the model unpacks what a block returns
            if values > _MOST_VALUES:
                name, changed = type(model).__name__, str(_HandedOnChanged())
                reason = changed if changed in reasons else reasons[0]
                raise BesaError(f"{name} is not supported: {reason}")
        known = calls[0] if calls else row
        row = [
            old if _same((old.args, old.kwargs), (new.args, new.kwargs)) else new
            for old, new in zip(known, row, strict=True)
        ]
        hidden.append(first)
        calls.append(row)
    return hidden, calls


class _HandedOnChanged(Exception):
    """A block did not receive what the one before it handed on."""

    def __str__(self) -> str:
        return "it changes the hidden states between its blocks"


def _capture_one(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, values: int
) -> tuple[Tensor, list[Call]]:
    """One batch; a stand-in returns a tuple of `values`, or the bare hidden states for 0."""
    seen: list[Call] = []
    first: list[Tensor] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if not args:  # hidden states given by keyword: always the first one
            name = next(iter(kwargs))
            args = (kwargs.pop(name),)
        hidden = args[0]
        if first and hidden is not first[0]:
            raise _HandedOnChanged
        first.append(hidden)
        seen.append(Call(args[1:], kwargs))
        return (hidden, *[None] * (values - 1)) if values else hidden

    for block in blocks:
        block.forward = stand_in
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    if len(seen) != len(blocks):
        raise BesaError(
            f"{type(model).__name__} is not supported: it called {len(seen)} of its "
            f"{len(blocks)} blocks"
        )
    return first[0], seen


_TIMES = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm)


class observe(TorchFunctionMode):
    """While it is entered, reports the input of every linear whose weight is used.

    Calls `see(linear, group, inputs)` with inputs [tokens, cols], group by group; `group` is the
    expert's index, 0 for an ordinary linear.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Sequence[Linear],
        see: Callable[[Linear, int, Tensor], None],
    ) -> None:
        super().__init__()
        self.see = see
        self.linears = {
            block.get_parameter(linear.parameter).untyped_storage().data_ptr(): linear
            for linear in linears
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = None
        if func is nn.functional.linear or func in _TIMES:
            operands = (*args, *kwargs.values())[:2]
        elif func is torch.addmm:
            operands = args[1:3]
        if operands is not None:
            inputs, weight = operands
            linear = self.linears.get(weight.untyped_storage().data_ptr())
            if linear is not None:
                inputs_first = (func is nn.functional.linear) != (weight.stride(-1) == 1)
                if inputs_first != linear.transposed:
                    raise BesaError(
                        f"besa does not know how {linear.name} is laid out; leave it dense with "
                        f"--exclude '{re.escape(linear.name)}'"
                    )
                self._report(linear, inputs, weight)
        return func(*args, **kwargs)

    def _report(self, linear: Linear, inputs: Tensor, weight: Tensor) -> None:
        if weight.ndim == 3:  # all experts at once: inputs [groups, tokens, cols]
            for group, group_inputs in enumerate(inputs):
                self.see(linear, group, group_inputs)
        else:
            group = weight.storage_offset() // (linear.rows * linear.cols)
            self.see(linear, group, inputs.reshape(-1, linear.cols))


def check_finite(tensor: Tensor, name: str, remedy: str) -> None:
    """Raises a BesaError that names the tensor and the remedy if it holds NaN or Inf."""
    if tensor.is_floating_point() and not math.isfinite(tensor.sum().item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise BesaError(f"{name} has {bad} values that are NaN or Inf: {remedy}")
