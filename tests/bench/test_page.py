"""The report page: whole, self-contained, true to its results, and looked at in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from besa.bench.formatting import amount, change
from besa.bench.page import render
from tests.bench.records import HOSTILE, everything
from tests.report.browser import BROWSER, WIDTHS, check, visit
from tests.report.test_report import Page, words

RUNS = everything()


@pytest.mark.parametrize("name", RUNS)
def test_page_loads_nothing_and_is_well_formed(name: str) -> None:
    page = render(RUNS[name])
    for tag, attributes in Page(page).tags:
        assert tag not in {"iframe", "object", "embed", "base", "img"}
        assert "src" not in attributes
        assert not any(attribute.startswith("on") for attribute in attributes)
    assert set(re.findall(r"https?://[^\"'\s<)]*", page)) <= {"http://www.w3.org/2000/svg"}
    ids = []
    for picture in re.findall(r"<svg.*?</svg>", page, re.S):
        root = ElementTree.fromstring(picture)
        ids += [child.attrib["id"] for child in list(root)[:2]]
        assert "nan" not in picture
        assert not re.search(r"\binf\b", picture)
    assert len(set(ids)) == len(ids), "two pictures share an id"


@pytest.mark.parametrize("name", ["two", "many", "offline", "broken"])
def test_page_quotes_the_results(name: str) -> None:
    results = RUNS[name]
    text = words(render(results))
    for one in results.measurements:
        for figure, spread in one.summary.items():
            assert amount(figure, spread) in text
    for loads in results.comparisons.values():
        for gains in loads.values():
            for gain in gains.values():
                assert change(gain) in text
    for contender in results.contenders:
        assert contender.name in text
        assert contender.broken is None or contender.broken in text
    for note in results.notes:
        assert note in text
    assert ("random weights" in text) is any(x.random_weights for x in results.contenders)


def test_gains_are_over_what_runs_in_the_same_engine() -> None:
    results = RUNS["offline"]
    assert "Against dense." in words(render(results))
    assert "gains over dense," in words(render(results))
    first, second = results.contenders
    results = replace(results, contenders=(first, replace(second, engine="onnx")))
    assert "Against the first in the same engine." in words(render(results))
    assert "gains over the first in the same engine," in words(render(results))


def test_the_lead_says_at_how_many_loads() -> None:
    results = RUNS["offline"]
    assert "50%: 1.50× the tokens per second." in words(render(results))
    gain = results.comparisons["50%"]["batch 1"]
    worse = {"decode_tps": replace(gain["decode_tps"], median=0.5, verdict="worse")}
    mixed = replace(results, comparisons={"50%": {"batch 1": gain, "batch 4": worse}})
    lead = "1.50× the tokens per second at 1 of the 2 loads, fewer tokens per second at 1 of the 2"
    assert f"50%: {lead} loads." in words(render(mixed))
    slower = replace(results, comparisons={"50%": {"batch 1": worse, "batch 4": worse}})
    assert "50%: fewer tokens per second at each of the 2 loads." in words(render(slower))


def test_hostile_name_stays_text() -> None:
    page = render(RUNS["hostile"])
    assert HOSTILE[:40] not in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert not re.search(r"[\x00-\x08\x0e-\x1f]", page)


@pytest.fixture(scope="module", params=["light", "dark"])
def visited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, Any], str]:
    """Whether it is dark, what every page saw of itself, and the console."""
    dark = request.param == "dark"
    pages = {name: render(results) for name, results in RUNS.items()}
    return dark, *visit(pages, tmp_path_factory.mktemp("pages"), dark)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RUNS)
def test_page_in_a_browser(
    visited: tuple[bool, dict[str, Any], str], name: str, width: int
) -> None:
    dark, pages, console = visited
    check(pages[f"{name}-{width}"], console, dark, width)
    assert pages[f"{name}-{width}"]["overlaps"] == []
