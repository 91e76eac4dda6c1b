"""vLLM's processes sleep while they wait for each other; by vLLM's own class for waiting."""

from __future__ import annotations

import time

import pytest

from besa.serve.vllm.waiting import BUSY, NAP, wait_asleep

pytestmark = pytest.mark.slow


def test_a_reader_sleeps_and_is_woken(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm")
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    monkeypatch.setattr(shm_broadcast, "SpinCondition", shm_broadcast.SpinCondition)
    wait_asleep()
    wait_asleep()  # as vLLM calls it
    context, address = zmq.Context(), get_open_zmq_ipc_path()
    writer = shm_broadcast.SpinCondition(False, context, address)
    reader = shm_broadcast.SpinCondition(True, context, address)
    reader.record_read()
    started, looks = time.monotonic(), 0
    while time.monotonic() < started + BUSY / 2:
        reader.wait(5000)
        looks += 1
    # vLLM's own looks a hundred times in a millisecond. With none it would miss what it is not
    # woken for.
    assert 1 <= looks <= 1 + (time.monotonic() - started) * 1000 / NAP
    reader.last_read -= BUSY
    started = time.monotonic()
    writer.notify()
    reader.wait(60_000)
    assert time.monotonic() < started + 60
    context.destroy(linger=0)
