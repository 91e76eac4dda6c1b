"""What processes use, of this one and of a child."""

from __future__ import annotations

import os
import socket
import sys
import time

from besa.processes.child import ChildProcess
from besa.processes.usage import cpu_seconds, family, listener, memory_of


def test_a_family():
    with ChildProcess([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        assert {os.getpid(), child.popen.pid} <= set(family(os.getpid()))
        assert family(child.popen.pid) == [child.popen.pid]
    assert family(child.popen.pid) == []


def test_memory():
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    found = memory_of([os.getpid()])
    assert found["steady"] is not None
    assert found["peak"] is not None
    assert len(block) < found["steady"] <= found["peak"]
    assert memory_of([]) == {"steady": None, "peak": None, "gpu": None}


def test_cpu():
    before = cpu_seconds([os.getpid()])
    while time.process_time() < before + 0.1:
        pass
    assert 0.05 < cpu_seconds([os.getpid()]) - before < 60


def test_who_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listener(f"http://127.0.0.1:{port}") == os.getpid()
        assert listener(f"http://box.example:{port}") is None
    assert listener(f"http://127.0.0.1:{port}") is None
