"""Mixtures: samples for starved experts, and experts that are dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from besa.errors import BesaError
from besa.model.blocks import expert_count
from besa.progress import Event
from besa.pruning.config import PruneConfig
from besa.pruning.expert_tokens import SPARE, feeding
from besa.pruning.pipeline import PruneResult
from besa.pruning.run import prune as prune_model
from tests.helpers import (
    assert_same_record,
    digests,
    load_strictly,
    random_model,
    run,
    save_with_tokenizer,
)
from tests.pruning.test_families import shunned
from tests.tiny import tiny_model as tiny

MakeModel = Callable[[str], Path]

SAMPLES = 4
SEQLEN = 16


def prune(model: Path, out: Path, calibration: Path, **options: Any) -> PruneResult:
    tell = options.pop("tell", lambda event: None)
    settings = {"method": "wanda", "samples": SAMPLES, "seqlen": SEQLEN, "device": "cpu", **options}
    return prune_model(model, PruneConfig(out=out, calibration=str(calibration), **settings), tell)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(120).view(4, 30)).logits


# ------------------------------------------------------------------------------- tokens


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(1, 30),
)
def test_windows_are_added_until_no_other_helps(counts: list[list[int]], seen: int, wanted: int):
    table, seen = torch.tensor(counts), min(seen, len(counts))
    added = feeding(table, seen, wanted)
    assert added == sorted(set(added))
    assert all(seen <= window < len(counts) for window in added)
    lacking = (wanted - table[[*range(seen), *added]].sum(0)).clamp_min(0)
    others = [i for i in range(seen, len(counts)) if i not in added]
    assert not torch.minimum(table[others], lacking).any()


def test_starved_experts_see_more_tokens(
    family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model = family_model("qwen3_moe")
    plain = prune(model, tmp_path / "plain", calibration)
    fed = prune(model, tmp_path / "fed", calibration, expert_tokens=70)
    for before, after in zip(plain.record.blocks, fed.record.blocks, strict=True):
        for linear, more in zip(before.linears, after.linears, strict=True):
            few, many = sum(linear.expert_tokens), sum(more.expert_tokens)
            assert few <= many <= (1 + SPARE) * few
            assert min(more.expert_tokens, default=0) >= min(linear.expert_tokens, default=0)
    experts = [x for x in fed.record.blocks[0].linears if x.expert_tokens]
    assert [min(linear.expert_tokens) > 32 for linear in experts] == [True, True]
    told = [note for note in fed.record.notes if "fewer than 70" in note]
    assert len(told) == sum(min(x.expert_tokens) < 70 for x in experts)


def test_an_interrupted_run_takes_the_same_samples(
    family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model, settings = family_model("mixtral"), {"expert_tokens": 40, "drop_experts": 1}
    whole = prune(model, tmp_path / "whole", calibration, **settings)

    def interrupt(event: Event) -> None:
        counted.append(event.phase)
        if event.block == 1:
            raise KeyboardInterrupt

    counted: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", calibration, **settings, tell=interrupt)
    assert {"dropping", "counting"} < set(counted)
    phases: list[str] = []
    settings["tell"] = lambda event: phases.append(event.phase)
    again = prune(model, tmp_path / "out", calibration, **settings)
    assert not {"dropping", "counting"} & set(phases)
    assert digests(again.out) == digests(whole.out)
    assert_same_record(again.out, whole.out)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", tmp_path / "whole"]


# ------------------------------------------------------------------------------- dropping


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_an_expert_that_no_token_reaches_is_dropped_and_nothing_changes(
    family: str, tiny_model: Path, calibration: Path, tmp_path: Path
):
    dense = shunned(family, 2)
    model = save_with_tokenizer(dense, tmp_path / "model", tiny_model)
    result = prune(model, tmp_path / "out", calibration, drop_experts=1, exclude="experts")
    assert set(result.record.dropped_experts.values()) == {(2,)}
    pruned = load_strictly(result.out)
    unpruned = dict(dense.named_parameters())
    for name, parameter in pruned.named_parameters():
        if "self_attn" in name:  # what was pruned
            parameter.data.copy_(unpruned[name])
    assert expert_count(pruned.config) == 3
    torch.testing.assert_close(logits(pruned), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe", "ernie4_5_moe"])
def test_what_carries_least_is_dropped(
    family: str, tiny_model: Path, calibration: Path, tmp_path: Path
):
    groups = 2 if family == "deepseek_v3" else 1
    changes = {"n_routed_experts": 8, "topk_group": 2} if groups == 2 else {}
    model = random_model(family, **changes)
    (name, experts) = [(n, m) for n, m in model.named_modules() if n.endswith(".experts")][-1]
    count = len(next(experts.parameters()))
    least = [0, count - 1] if groups == 2 else [1, 2]  # one of each group
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[least] *= 0.01
    directory = save_with_tokenizer(model, tmp_path / "model", tiny_model)
    result = prune(directory, tmp_path / "out", calibration, drop_experts=2, exclude="experts")
    assert result.record.dropped_experts[name] == tuple(least)

    kept = torch.tensor([x for x in range(count) if x not in least])
    pruned = dict(load_strictly(result.out).state_dict())
    place = name.removesuffix("experts")
    compared = 0
    for own, tensor in model.state_dict().items():
        if own.startswith(place) and count in tensor.shape:
            expected = tensor.index_select(tensor.shape.index(count), kept)
            assert torch.equal(pruned[own], expected), own
            compared += not own.startswith(name)
    assert compared  # of the router


def test_where_no_experts_can_be_dropped(
    family_model: MakeModel,
    tiny_model: Path,
    calibration: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
):
    odd = save_with_tokenizer(tiny("llama4_text"), tmp_path_factory.mktemp("odd"), tiny_model)
    refusals = [
        (tiny_model, 1, "no stacked experts"),
        (family_model("mixtral"), 3, "too few for the 2"),
        (family_model("deepseek_v3"), 1, "2 groups"),
        (odd, 1, "cannot drop experts of a Llama4ForCausalLM"),
    ]
    for model, count, words in refusals:
        with pytest.raises(BesaError, match=words):
            prune(model, tmp_path / "out", calibration, drop_experts=count)
        assert not list(tmp_path.iterdir())


def test_flags(family_model: MakeModel, calibration: Path, tmp_path: Path):
    words = ("prune", family_model("mixtral"), "--out", "out", "--calibration", calibration)
    words += ("--samples", SAMPLES, "--seqlen", SEQLEN, "--method", "wanda")
    process = run(*words, "--expert-tokens", 1000, "--drop-experts", 1, cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "fewer than 1000 calibration tokens reached experts 0 (" in process.output
    record = json.loads((tmp_path / "out/besa.json").read_text())
    assert [len(gone) for gone in record["dropped_experts"].values()] == [1, 1]
