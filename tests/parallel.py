"""How the workers of pytest-xdist share a machine; `make test` starts two of them.

A worker gets whole files (`--dist loadfile`), so that what the tests of a file share, a server or
a model, is made once. The file whose tests are to be alone comes first, beside files of many short
tests, which soon leave the room; then those files that take longest, so that the workers end
together.

A test marked `alone` measures time or memory. No other test runs while it does, or its fixtures:

    @pytest.mark.alone
    def test_the_latency_is_right(): ...

The other tests share a lock that such a test has for itself, the room. Each test waits for it with
a second lock in hand, the door, so that nobody overtakes a test that waits to be alone. Tests that
are to be alone and follow each other stay in the room: once the others have left, they need not
leave again. So the tests of a file that are to be alone stand together.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO

import pytest

# Files in the order in which workers take them; the others follow as they come.
FIRST = (
    "tests/bench/test_cli.py",  # to be alone
    "tests/pruning/test_every_type.py",  # short
    "tests/pruning/test_families.py",  # short
    "tests/kernels/test_sparse_linear.py",  # short
    "tests/serve/",  # long
    "tests/demo/",
    "tests/kernels/test_arm.py",
    "tests/benchmarks/",
    "tests/test_packaging.py",
)

# The folder with the locks; set where there are workers.
LOCKS = "BESA_TEST_LOCKS"


def place_of(item: pytest.Item) -> int:
    """The place of a test's file among the others."""
    starts = [item.nodeid.startswith(place) for place in FIRST]
    return starts.index(True) if any(starts) else len(starts)


# ------------------------------------------------------------------------- pytest's hooks


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # the process that starts the workers
        os.environ[LOCKS] = tempfile.mkdtemp(prefix="besa-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(LOCKS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place_of)  # stable: inside a file nothing moves


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    if LOCKS not in os.environ:  # one test at a time
        return (yield)
    room = _rooms.pop() if _rooms else _entered(Path(os.environ[LOCKS]), is_alone(item))
    try:
        return (yield)
    finally:
        if is_alone(item) and nextitem is not None and is_alone(nextitem):
            _rooms.append(room)
        else:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing is not enough: a child may have inherited it
            room.close()


# The room, while the next test goes on in it.
_rooms: list[IO[str]] = []


def is_alone(item: pytest.Item) -> bool:
    """Whether no other test may run beside this one."""
    return item.get_closest_marker("alone") is not None


def _entered(locks: Path, alone: bool) -> IO[str]:
    """The room, for oneself or with others."""
    room = (locks / "room").open("a")
    with (locks / "door").open("a") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
    return room
