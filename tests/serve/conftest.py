"""A masked model, the same packed, and another mask, for all tests that need a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve import serving


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With zeros."""
    return serving.masked(tmp_path_factory.mktemp("served") / "dense", seed=0)


@pytest.fixture(scope="session")
def sparse(dense: Path) -> Path:
    """The same, packed."""
    return serving.packed(dense, dense.with_name("sparse"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With other zeros."""
    return serving.masked(tmp_path_factory.mktemp("served") / "other", seed=1)
