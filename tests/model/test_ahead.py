"""A block that is loaded on a thread is the same as one loaded now, and so is what goes wrong."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from besa.errors import BesaError
from besa.model.ahead import LoadAhead


def test_a_begun_block_is_loaded_on_another_thread():
    threads: list[int] = []

    def load(index: int) -> nn.Module:
        threads.append(threading.get_ident())
        return nn.Linear(index + 1, 1)

    with LoadAhead(load) as loading:
        first = loading.take(0)
        loading.begin(1)
        second = loading.take(1)
    assert [first.in_features, second.in_features] == [1, 2]
    assert threads[0] == threading.get_ident() != threads[1]


def test_an_error_is_raised_where_its_block_is_taken():
    def load(index: int) -> nn.Module:
        raise BesaError(f"block {index} is damaged")

    with LoadAhead(load) as loading:
        loading.begin(1)
        with pytest.raises(BesaError, match="block 1 is damaged"):
            loading.take(1)


def test_a_dropped_block_is_over_and_its_error_forgotten():
    loaded = []

    def load(index: int) -> nn.Module:
        loaded.append(index)
        raise BesaError("damaged")

    with LoadAhead(load) as loading:
        loading.drop()
        loading.begin(1)
        loading.drop()
        assert loaded == [1]
        loading.begin(2)  # it is not waited for either
    assert loaded in ([1], [1, 2])


def test_leaving_waits_for_the_thread():
    started, go_on = threading.Event(), threading.Event()
    over = []

    def load(index: int) -> nn.Module:
        started.set()
        go_on.wait(10)
        over.append(index)
        return nn.Identity()

    with LoadAhead(load) as loading:
        loading.begin(0)
        started.wait(10)
        go_on.set()
    assert over == [0]


def test_the_thread_has_its_own_gradient_mode():
    """Why the pipeline's loading switches gradients off itself."""
    modes = []

    def load(_: int) -> nn.Module:
        modes.append(torch.is_grad_enabled())
        return nn.Identity()

    with torch.no_grad(), LoadAhead(load) as loading:
        loading.begin(0)
        loading.take(0)
    assert modes == [True]
