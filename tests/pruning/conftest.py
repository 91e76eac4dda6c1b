"""Fixtures of the tests of pruning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import random_model, save_with_tokenizer

MakeModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def family_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a family's tiny model on disk, once. Do not write into it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp("models") / family
            made[family] = save_with_tokenizer(random_model(family), directory, tiny_model)
        return made[family]

    return make
