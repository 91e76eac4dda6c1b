"""Stored tensors and the stacked weight that transformers makes of them: the same rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from besa.model.blocks import Linear
from besa.model.expert_parts import parts_of
from besa.model.layout import Layout

NAME = "experts.gate_up"


class Model(nn.Module):
    base_model_prefix = ""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.empty(shape, device="meta"))


def by_expert(experts: int, *kinds: str) -> list[str]:
    return [f"experts.{number}.{kind}.weight" for number in range(experts) for kind in kinds]


# Each way in which files hold experts: the stored shapes for (experts, rows, cols), and what is
# done to them.
WAYS: dict[str, Any] = {
    "one by one": (
        lambda e, r, c: dict.fromkeys(by_expert(e, "up"), (r, c)),
        WeightConverter("experts.*.up.weight", NAME, [MergeModulelist(0)]),
    ),
    "gate and up apart": (
        lambda e, r, c: dict.fromkeys(by_expert(e, "w1", "w3"), (r // 2, c)),
        WeightConverter(
            ["experts.*.w1.weight", "experts.*.w3.weight"],
            NAME,
            [MergeModulelist(0), Concatenate(1)],
        ),
    ),
    "turned": (
        lambda e, r, c: {"experts.stack": (e, c, r)},
        WeightConverter("experts.stack", NAME, [Transpose(1, 2)]),
    ),
    "interleaved": (
        lambda e, r, c: {"experts.stack": (e, r, c)},
        WeightConverter("experts.stack", NAME, [Interleave(1)]),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=20)
@given(experts=st.integers(1, 13), half=st.integers(4, 9), cols=st.integers(3, 20))
def test_rows_are_those_of_what_transformers_makes(way: str, experts: int, half: int, cols: int):
    shapes, converter = WAYS[way]
    rows = 2 * half
    stored = {key: torch.randn(shape) for key, shape in shapes(experts, rows, cols).items()}
    model = Model((experts, rows, cols))
    linear = Linear(NAME, NAME, experts, rows, cols, False)
    found = parts_of({NAME: linear}, stored, model, [converter])[NAME]
    assert found is not None
    assert sorted(part.key for part in found) == sorted(stored)
    whole = torch.empty(experts * rows, cols)
    for part in found:
        assert part.layout.shape == stored[part.key].shape
        matrix = part.layout.matrix(stored[part.key])
        whole[part.rows] = matrix
        assert part.layout.stored(matrix).equal(stored[part.key])
    assert whole.equal(made_by(way, stored, experts, rows, cols).flatten(0, 1))


def made_by(way: str, stored: dict[str, Tensor], experts: int, rows: int, cols: int) -> Tensor:
    """The stacked weight, written out."""
    if way == "turned":
        return stored["experts.stack"].mT
    if way == "interleaved":
        stack = stored["experts.stack"]
        return torch.cat([stack[:, ::2], stack[:, 1::2]], 1)
    return torch.cat([*stored.values()]).reshape(experts, rows, cols)


def test_what_is_not_rows_is_none():
    linear = Linear(NAME, NAME, 4, 8, 12, False)
    model = Model((4, 8, 12))
    sums = WeightConverter(by_expert(1, "up")[0].replace("0", "*"), NAME, [Summed()])
    keys = by_expert(4, "up")
    assert parts_of({NAME: linear}, keys, model, [sums])[NAME] is None
    merged = WAYS["one by one"][1]
    assert parts_of({NAME: linear}, keys[:3], model, [merged])[NAME] is None
    assert parts_of({NAME: linear}, [], model, [merged])[NAME] is None
    (whole,) = parts_of({NAME: linear}, [NAME], model, [merged])[NAME] or ()
    assert (whole.key, whole.layout) == (NAME, Layout(32, 12, False, 4))


class Summed(MergeModulelist):
    """Each expert's rows less those of the one before."""

    def convert(self, input_dict: Any, *args: Any, **more: Any) -> Any:
        merged = super().convert(input_dict, *args, **more)
        return {name: torch.diff(t, dim=0, prepend=t[:1]) for name, t in merged.items()}
