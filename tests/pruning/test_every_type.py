"""Every type of decoder that transformers knows, alone and inside of models that see.

What becomes of each stands in docs/families.md, which is made of the same outcomes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.outcome import PAGE, listed, outcome_of, types_of

LISTED = listed(PAGE.read_text(encoding="utf-8"))

# What runs while one works: of each way in which blocks, experts or wrappers differ, one.
FEW = {
    "decoders": {
        "deepseek_v4",
        "gpt_neo",
        "llama4_text",
        "longcat_flash",
        "mamba",
        "xlm",
        "zamba2",
    },
    "wrappers": {
        "blip-2",
        "gemma3",
        "idefics3",
        "llama4",
        "mistral3",
        "qwen2_5_vl",
        "qwen3_vl_moe",
    },
}


def cases(part: str) -> list[object]:
    """The types that both the page and the installed transformers know."""
    known = [name for name in types_of(seen=part == "wrappers") if name in LISTED[part]]
    assert FEW[part] <= set(known)
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in FEW[part] else slow) for name in known]


@pytest.mark.parametrize("model_type", cases("decoders"))
def test_a_decoder_is_pruned_or_refused_as_the_page_says(model_type: str, tmp_path: Path):
    outcome = outcome_of(model_type, False, tmp_path)
    assert (outcome.kind, outcome.refused) == LISTED["decoders"][model_type]


@pytest.mark.parametrize("model_type", cases("wrappers"))
def test_a_wrappers_decoder_is_pruned_or_refused_as_the_page_says(model_type: str, tmp_path: Path):
    kind, reason = LISTED["wrappers"][model_type]
    outcome = outcome_of(model_type, True, tmp_path)
    if kind == "untried" and outcome.made:
        pytest.skip("here is a package more than where the page was written")
    assert (outcome.kind, outcome.refused) == (kind, reason)


@pytest.mark.parametrize("part", LISTED)
def test_the_page_lists_every_type(part: str):
    text = PAGE.read_text(encoding="utf-8")
    (version,) = re.findall(r"transformers (\S+) knows", text)
    if transformers.__version__ != version:
        pytest.skip(f"the page is of transformers {version}")
    assert sorted(LISTED[part]) == types_of(seen=part == "wrappers")
