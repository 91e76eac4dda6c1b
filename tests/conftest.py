"""Fixtures that all tests share: a tiny model on disk and the command line as users start it."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests.helpers import PATIENCE, REPOSITORY, SENTENCES, VOCABULARY, byte_tokenizer
from tests.parallel import (  # noqa: F401 - pytest's hooks
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_protocol,
)

Besa = Callable[..., subprocess.CompletedProcess[str]]

# Before torch is imported anywhere: the tests' matrices are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Before transformers is: code that comes with models is copied there, and run from there.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="besa-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# No verdict depends on how fast the machine is.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same random numbers, whatever has run before it in the process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 3 blocks (hidden 64, 257 tokens, 128 positions) with its tokenizer.

    A byte is a token. Do not write into it: every test reads the same directory.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny"
    byte_tokenizer().save_pretrained(directory)

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 6,000 letters."""
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(SENTENCES)
    return path


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness can be imported: installed, or put beside by `make test`."""
    for beside in Path(sys.prefix).glob("harness/lib/python*/site-packages"):
        monkeypatch.setattr(sys, "path", [*sys.path, str(beside)])
    pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: pip install 'besa[eval]'")


@pytest.fixture
def besa(tmp_path: Path) -> Besa:
    """Runs `besa` in a new interpreter, in the test's directory; its output as text.

    That takes seconds more than `tests.helpers.run`, which forks an interpreter that has torch.
    """

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "besa", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run
