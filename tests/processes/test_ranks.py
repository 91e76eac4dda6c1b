"""Dealing out work, and what one process alone does."""

from __future__ import annotations

import pytest
import torch

from besa.errors import BesaError
from besa.processes.launch import Launch, launch_of
from besa.processes.ranks import ALONE, Ranks


def ranks(size: int) -> list[Ranks]:
    return [Ranks(Launch(rank, size)) for rank in range(size)]


def test_all_is_dealt_once():
    items = list(range(7))
    dealt = [each.share(items) for each in ranks(3)]
    assert sorted(x for share in dealt for x in share) == items
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_the_dearest_work_is_dealt_first():
    costs = [1.0, 8.0, 3.0, 4.0]
    assert [each.deal(costs) for each in ranks(2)] == [[1, 0, 1, 1]] * 2
    assert ALONE.deal(costs) == [0] * 4


def test_one_process_alone_changes_nothing():
    tensor, parameter = torch.ones(2), torch.ones(3, requires_grad=True)
    ALONE.sum_(tensor)
    ALONE.broadcast_(tensor)
    ALONE.sum_gradients([parameter])
    assert tensor.tolist() == [1, 1]
    assert parameter.grad is None
    assert ALONE.gather("x") == ["x"]
    assert ALONE.device("cuda:1") == "cuda:1"


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    two = [Ranks(Launch(rank, 2, rank, 2)) for rank in range(2)]
    assert [each.device(None) for each in two] == ["cuda:0", "cuda:1"]
    assert [each.device("cpu") for each in two] == ["cpu", "cpu"]
    with pytest.raises(BesaError, match="give cuda or cpu"):
        two[0].device("cuda:1")
    with pytest.raises(BesaError, match="3 processes share 2 GPUs: lower --nproc-per-node"):
        Ranks(Launch(0, 3, 0, 3)).device("cuda")


def test_a_launch_needs_all_that_torchrun_tells():
    assert launch_of({"WORLD_SIZE": "2", "RANK": "1"}) == Launch()
