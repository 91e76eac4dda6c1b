"""Windows are dealt to processes so that what belongs together stays the same."""

from __future__ import annotations

import pytest
import torch

from besa.errors import BesaError
from besa.processes.launch import Launch
from besa.processes.ranks import Ranks
from besa.pruning.batches import batches_of

WINDOWS = torch.arange(22).repeat_interleave(128).view(22, 128)


def numbers(tokens: list[torch.Tensor], batches: range) -> list[int]:
    """The windows in batches."""
    return [int(window[0]) for i in batches for window in tokens[i]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("step", [None, 1, 3, 8])
def test_a_step_has_the_same_windows_however_many_processes_share_it(size: int, step: int | None):
    dealt = [
        batches_of(WINDOWS, held_out=4, step=step, ranks=Ranks(Launch(rank, size)))
        for rank in range(size)
    ]
    first, count = 0, step or 4
    for kind, last, most in (("steps", 18, count), ("held_out", 22, 4)):
        for groups in zip(*(getattr(groups, kind) for _, groups in dealt), strict=True):
            parts = [numbers(dealt[i][0], group.batches) for i, group in enumerate(groups)]
            wanted = list(range(first, min(first + most, last)))
            assert sorted(x for part in parts for x in part) == wanted
            assert {group.windows for group in groups} == {len(wanted)}
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            first += len(wanted)
        assert first == last
    own = [sum(map(len, tokens)) for tokens, _ in dealt]
    assert max(own) - min(own) <= 1
    assert all(len(batch) <= 4 for tokens, _ in dealt for batch in tokens)
    assert all(groups.seen == groups.steps[-1].batches.stop for _, groups in dealt)


def test_each_process_needs_a_sample_to_learn_from():
    with pytest.raises(BesaError, match="5 processes need as many samples to learn from, not 4"):
        batches_of(WINDOWS[:5], held_out=1, ranks=Ranks(Launch(0, 5)))
