"""How the workers of pytest-xdist share a machine; `make test` starts two of them.

A worker gets whole files (`--dist loadfile`), so that what the tests of a file share, a server or
a model, is made once. The files that take longest come first, so that the workers end together.

A test marked `alone` measures time or memory. No other test runs while it does, or its fixtures:

    @pytest.mark.alone
    def test_the_latency_is_right(): ...

The other tests share a lock that such a test has for itself, the room. Each test waits for it with
a second lock in hand, the door, so that nobody overtakes a test that waits to be alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

# Where the long tests are, the longest first; the other folders follow as they come.
LONGEST_FIRST = ("tests/serve/", "tests/bench/", "tests/demo/", "tests/test_packaging.py")

# The folder with the locks; set where there are workers.
LOCKS = "BESA_TEST_LOCKS"


def longest_first(item: pytest.Item) -> int:
    """The place of a test's file among the others."""
    starts = [item.nodeid.startswith(place) for place in LONGEST_FIRST]
    return starts.index(True) if any(starts) else len(starts)


# ------------------------------------------------------------------------- pytest's hooks


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # the process that starts the workers
        os.environ[LOCKS] = tempfile.mkdtemp(prefix="besa-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(LOCKS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=longest_first)  # stable: inside a file nothing moves


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if LOCKS not in os.environ:  # one test at a time
        return (yield)
    locks = Path(os.environ[LOCKS])
    alone = item.get_closest_marker("alone") is not None
    with (locks / "door").open("a") as door, (locks / "room").open("a") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing is not enough: a child may have inherited it
