"""Observes the inputs of every linear in a block while the block runs.

It looks at the products in which a weight is used, not at the modules, and so works alike for
`nn.Linear`, GPT-2's `Conv1D` and fused experts (3-D parameters).

>>> from besa.model.blocks import find_linears
>>> block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
>>> linears = find_linears(block, "block", experts=None)
>>> with observe(block, linears, lambda linear, group, x: print(linear.name, list(x.shape))):
...     output = block(torch.ones(5, 16))
0 [5, 16]
2 [5, 32]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from besa.errors import BesaError
from besa.model.blocks import Linear

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm)

T = TypeVar("T")

# Is given a linear, a group of it, and inputs [tokens, cols].
OnInput = Callable[[Linear, int, Tensor], None]


class products(TorchFunctionMode, Generic[T]):
    """While it is entered, reports each product in which a weight is used.

    Args:
        weights: what is watched, by what it is reported as. Views of them count as well.
        report: is given that, the product's inputs, the weight as it stands there, and whether the
            product turns it, as `functional.linear` does.
    """

    def __init__(
        self, weights: Mapping[T, Tensor], report: Callable[[T, Tensor, Tensor, bool], None]
    ) -> None:
        super().__init__()
        self.report = report
        self.known = {weight.untyped_storage().data_ptr(): key for key, weight in weights.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = None
        if func is nn.functional.linear or func in _PRODUCTS:
            operands = (*args, *kwargs.values())[:2]
        elif func is torch.addmm or func is torch.baddbmm:
            operands = args[1:3]
        if operands is not None:
            inputs, weight = operands
            place = weight.untyped_storage().data_ptr()
            if place in self.known:
                self.report(self.known[place], inputs, weight, func is nn.functional.linear)
        return func(*args, **kwargs)


class observe(products[Linear]):
    """While it is entered, reports the input of every linear whose weight is used.

    Calls `on_input(linear, group, inputs)` with inputs [tokens, cols], group by group; `group` is
    the expert's index, 0 for an ordinary linear.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Sequence[Linear],
        on_input: OnInput,
    ) -> None:
        weights = {linear: block.get_parameter(linear.parameter) for linear in linears}
        # A method of this object's would hold the object, and with it the block that `on_input`
        # belongs to, until the garbage collector comes by.
        super().__init__(weights, partial(_by_group, on_input))


def _by_group(
    on_input: OnInput, linear: Linear, inputs: Tensor, weight: Tensor, turned: bool
) -> None:
    """Reports a product's inputs group by group."""
    inputs_first = turned != (weight.stride(-1) == 1)
    if inputs_first != linear.transposed:
        raise BesaError(
            f"besa does not know how {linear.name} is laid out; leave it dense with "
            f"--exclude '{re.escape(linear.name)}'"
        )
    if weight.ndim == 3:  # all experts at once: inputs [groups, tokens, cols]
        for group, group_inputs in enumerate(inputs):
            on_input(linear, group, group_inputs)
    else:
        group = weight.storage_offset() // (linear.rows * linear.cols)
        on_input(linear, group, inputs.reshape(-1, linear.cols))
