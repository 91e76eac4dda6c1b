"""Products of inputs, gathered batch by batch, against all of them at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from besa.errors import BesaError
from besa.model.blocks import Linear, find_linears
from besa.model.replay import Call
from besa.pruning.grams import Gram, LevelGrams, level_inputs
from besa.pruning.levels import Level, levels

TOKENS = 12


class Block(nn.Module):
    """Two linears that read the same, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        self.ran_to_the_end = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.gate(x) * self.up(x))
        self.ran_to_the_end += 1
        return x


def a_block() -> tuple[Block, list[Level]]:
    torch.manual_seed(0)
    block = Block()
    found = levels(block, find_linears(block, "b", None), lambda: block(torch.randn(1, 4, 16)))
    block.ran_to_the_end = 0
    return block, found


@torch.no_grad()
def test_products_are_those_of_all_inputs():
    block, (first, second) = a_block()
    x, dense = torch.randn(3, TOKENS, 16), torch.randn(3, TOKENS, 16)
    middle, dense_middle = (block.gate(i) * block.up(i) for i in (x, dense))
    for level, own, other in ((first, x, dense), (second, middle, dense_middle)):
        grams = LevelGrams(torch.device("cpu"))
        for i in range(3):
            given = level_inputs(block, level, Call((), {}), x[i : i + 1])
            grams.add(given, level_inputs(block, level, Call((), {}), dense[i : i + 1]), TOKENS)
        own, other = own.flatten(0, 1), other.flatten(0, 1)
        for linear in level.linears:
            (gram,) = grams.of(linear)
            assert gram is not None
            torch.testing.assert_close(gram.own, own.T @ own, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(gram.cross, other.T @ own, rtol=1e-4, atol=1e-4)
    assert block.ran_to_the_end == 0  # no run went further than its level


@torch.no_grad()
def test_linears_that_read_the_same_share_their_products():
    block, (first, _) = a_block()
    grams = LevelGrams(torch.device("cpu"))
    grams.add(level_inputs(block, first, Call((), {}), torch.randn(1, TOKENS, 16)), None, TOKENS)
    gate, up = (grams.of(linear)[0] for linear in first.linears)
    assert gate is not None
    assert up is not None
    assert gate.own is up.own
    assert gate.cross is None


def test_where_a_router_sends_other_tokens_there_is_no_cross_product():
    linear = Linear("up", "up", groups=3, rows=4, cols=8, transposed=False)
    x, dense = torch.randn(TOKENS, 8), torch.randn(TOKENS, 8)
    grams = LevelGrams(torch.device("cpu"))
    grams.add(
        {("up", 0): [x[:5]], ("up", 1): [x]}, {("up", 0): [dense[:5]], ("up", 1): [dense]}, 12
    )
    grams.add({("up", 1): [x[:7]]}, {}, 12)
    routed, once, unseen = grams.of(linear)
    assert routed is not None
    assert once is not None
    assert unseen is None
    torch.testing.assert_close(routed.own, x[:5].T @ x[:5])
    torch.testing.assert_close(once.own, x.T @ x + x[:7].T @ x[:7])
    assert routed.cross is once.cross is None


def test_the_aim_makes_up_for_inputs_that_have_changed():
    torch.manual_seed(0)
    dense, weight = torch.randn(400, 8), torch.randn(4, 8)
    x = dense @ (torch.eye(8) + 0.2 * torch.randn(8, 8)) + 0.05 * torch.randn(400, 8)
    aim = Gram(x.T @ x, dense.T @ x).aim(weight)
    best = torch.linalg.lstsq(x.double(), (dense @ weight.T).double()).solution.T

    def error(found: Tensor) -> float:
        return float((x.double() @ found.double().T - dense.double() @ weight.double().T).norm())

    assert error(best) <= error(aim) < 0.4 * error(weight)


@pytest.mark.parametrize("never", [0, 7])
def test_an_input_that_never_fires_keeps_its_weights(never: int):
    dense, weight = torch.randn(64, 8), torch.randn(4, 8)
    x = 0.9 * dense
    x[:, never] = 0
    aim = Gram(x.T @ x, dense.T @ x).aim(weight)
    assert aim.isfinite().all()
    torch.testing.assert_close(aim[:, never], weight[:, never])


@pytest.mark.parametrize("place", ["own", "cross"])
def test_sums_that_overflowed_are_refused_by_name(place: str):
    linear = Linear("mlp.down", "mlp.down.weight", 1, 4, 8, transposed=False)
    products = {"own": torch.eye(8), "cross": torch.eye(8)}
    products[place][3, 3] = torch.inf
    with pytest.raises(BesaError, match=r"mlp\.down are too large .* give --update none"):
        Gram(**products).check(linear)
