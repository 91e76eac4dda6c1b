"""How a file holds a weight: [out, in] or turned, of one linear or of experts in a stack.

>>> import torch
>>> weight = torch.arange(6).reshape(2, 3)
>>> turned = Layout(rows=2, cols=3, transposed=True)
>>> turned.stored(weight).shape, torch.equal(turned.matrix(turned.stored(weight)), weight)
(torch.Size([3, 2]), True)
>>> Layout(rows=8, cols=3, groups=4).shape      # four experts of two rows each
(4, 2, 3)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Layout:
    """How a weight of `rows` outputs by `cols` inputs is stored.

    Attributes:
        rows: of all groups together; those of one group lie together.
        cols: the inputs.
        transposed: whether it is stored [in, out], as GPT-2 does.
        groups: how many matrices are in a stack, such as experts; None for a matrix that is stored
            as one.
    """

    rows: int
    cols: int
    transposed: bool = False
    groups: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored tensor."""
        rows = self.rows // (self.groups or 1)
        matrix = (self.cols, rows) if self.transposed else (rows, self.cols)
        return matrix if self.groups is None else (self.groups, *matrix)

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored tensor as [rows, cols], a view where it can be one."""
        return (stored.mT if self.transposed else stored).reshape(self.rows, self.cols)

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix [rows, cols] as it is stored, contiguous."""
        stack = matrix if self.groups is None else matrix.unflatten(0, (self.groups, -1))
        return (stack.mT if self.transposed else stack).contiguous()


def layout_of(linear: nn.Linear | Conv1D) -> Layout:
    """How a file holds a linear's weight."""
    transposed = isinstance(linear, Conv1D)
    rows, cols = linear.weight.shape[::-1] if transposed else linear.weight.shape
    return Layout(rows, cols, transposed)
