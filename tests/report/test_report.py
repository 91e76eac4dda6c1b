"""The pages and the card: whole, self-contained, true to their record, deaf to hostile names."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import besa.report
from besa.model.prune_record import PruneRecord
from besa.report import figures, formatting, heat, names, palette, svg
from besa.report.comparison import Comparison
from besa.report.figures import Cell
from besa.typed_json import from_json
from tests.report.browser import BROWSER, WIDTHS, check, visit
from tests.report.records import GPT2, LLAMA, MIXTRAL, MOE, comparison, run

HOSTILE = (
    "</title><script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\x00\x1b\udcff" + "x" * 200
)
LONG = "/data/" + "a-rather-long-folder-name/" * 8 + "LLaMA-2-70B"


def hybrid() -> dict[str, Any]:
    """Blocks that do not all have the same linears."""
    record = run(6)
    for block in record["blocks"][::2]:
        block["linears"] = [x for x in block["linears"] if x["name"].startswith("mlp")]
    return record


def bare() -> dict[str, Any]:
    """Only what every run has: no errors, curves, notes or digests, and figures that are not."""
    record = run(2, method="magnitude")
    for block in record["blocks"]:
        block.update(error=None, error_wanda=float("nan"), loss=[])
        for linear in block["linears"]:
            del linear["rows"]
    del record["notes"], record["digests"]
    record.update(peak_memory_bytes=None, threads=None)
    return record


def guarded() -> dict[str, Any]:
    """A run whose updates held-out windows chose: one of each kind, one that overflowed."""
    record = run(4)
    tried = [("none", None), ("admm", None), ("learn", 0.02), ("learn", 0.006)]
    for index, (block, (update, step)) in enumerate(zip(record["blocks"], tried, strict=True)):
        errors = [0.08 - 0.01 * index, 0.06, 0.055, 0.05]
        block["update"] = {
            "chosen": update,
            "step": step,
            "tried": [
                {"update": name, "step": size, "error": error}
                for (name, size), error in zip(tried, errors, strict=True)
            ],
        }
    del record["blocks"][3]["update"]["tried"][1]
    record["blocks"][2]["update"]["tried"][3]["error"] = None
    record["settings"] |= {"update": "auto", "teacher": "dense", "bos": "auto"}
    return record


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "llama": lambda: run(8, notes=("Read 128 windows.",)),
    "70b": lambda: run(80, model=LONG),
    "gpt2": lambda: run(12, GPT2, model="gpt2", target=0.7),
    "moe": lambda: run(16, MOE),
    "mixtral": lambda: run(4, MIXTRAL),
    "one block": lambda: run(1, granularity="layer"),
    "wanda": lambda: run(32, method="wanda"),
    "2:4": lambda: run(8, pattern="2:4"),
    "dense": lambda: run(2, target=0.0, method="wanda"),
    "hostile": lambda: run(2, model=HOSTILE, notes=(HOSTILE,)),
    "hybrid": hybrid,
    "bare": bare,
    "guarded": guarded,
}


def read_run(record: dict[str, Any]) -> PruneRecord:
    return from_json(PruneRecord, record, lenient=True)


def render(record: dict[str, Any]) -> str:
    """The page of a run, as it comes from besa.json."""
    return besa.report.render(read_run(record))


def model_card(record: dict[str, Any]) -> str:
    return besa.report.model_card(read_run(record))


def render_comparison(record: dict[str, Any]) -> str:
    return besa.report.render_comparison(from_json(Comparison, record))


class Page(HTMLParser):
    """Every tag with its attributes, and the words between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def words(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(page).words))


@pytest.fixture(params=[*RUNS, "comparison", "hostile comparison"])
def page(request: pytest.FixtureRequest) -> str:
    if "comparison" in request.param:
        return render_comparison(comparison(HOSTILE if "hostile" in request.param else "besa-demo"))
    return render(RUNS[request.param]())


def test_page_loads_nothing(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in {"iframe", "object", "embed", "base", "img", "video", "audio"}
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        if tag == "link":
            assert (attributes["href"] or "").startswith("data:")
    assert "@import" not in page
    assert "url(" not in page
    addresses = set(re.findall(r"https?://[^\"'\s<)]*", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_page_is_well_formed(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert pictures
    ids = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        children = list(root)
        assert children[0].tag.endswith("title")
        assert children[0].text
        assert children[1].tag.endswith("desc")
        ids += [child.attrib["id"] for child in children[:2]]
        assert "nan" not in picture
        assert "inf" not in picture
    assert page.encode().decode() == page
    tags = [tag for tag, _ in Page(page).tags]
    assert tags.count("script") == 1
    assert tags.count("title") == 1 + len(pictures)
    assert len(set(ids)) == len(ids), "two pictures share an id"


def test_page_quotes_the_record() -> None:
    record = run(8, notes=("Read 128 windows.",))
    text = words(render(record))
    for needle in (
        "example-org/Llama-3-8B",
        "50.00%",
        f"{record['sparsity']['zeros']:,} of {record['sparsity']['weights']:,}",
        "2 min 03 s",
        "3.2 GiB",
        "Read 128 windows.",
        "0" * 63 + "2",
        "2.13.0",
    ):
        assert needle in text
    own = [block["error"] for block in record["blocks"]]
    wanda = [block["error_wanda"] for block in record["blocks"]]
    assert formatting.signed(sum(own) / sum(wanda) - 1) in text
    assert f"lower in {sum(a < b for a, b in zip(own, wanda, strict=True))} of 8" in text
    for block in record["blocks"]:
        assert formatting.significant(block["error"]) in text
        for linear in block["linears"]:
            assert formatting.percent(linear["sparsity"], 2) in text


def test_what_was_tried_and_kept_is_told_by_block() -> None:
    text = words(render(guarded()))
    assert "What made up for the zeros" in text
    assert "BESA + guarded updates" in text
    assert "difference from masks alone, lower is better" in text
    for kept in ("masks alone", "ADMM", "learned, step 0.02", "learned, step 0.006"):
        assert kept in text
    for error in (0.08, 0.07, 0.06, 0.055, 0.05):
        assert formatting.significant(error) in text
    assert "--update auto" in text
    assert "What made up for the zeros" not in words(render(run(4)))


def test_comparison_quotes_the_record() -> None:
    record = comparison()
    text = words(render_comparison(record))
    assert "27.90" in text
    assert "Lowest here: SparseGPT at 50%, 60%, 2:4; BESA, rates by row at 70%." in text
    for row in record["rows"]:
        assert f"{row['perplexity']:,.2f}" in text
        if row["recovered"] is not None:
            assert formatting.signed(row["recovered"]).lstrip("+") in text


def test_comparison_without_besa() -> None:
    record = comparison()
    record["rows"] = [row for row in record["rows"] if row["method"] == "magnitude"][:1]
    assert "Magnitude" in words(render_comparison(record))


def test_hostile_name_stays_text() -> None:
    for page in (render(RUNS["hostile"]()), render_comparison(comparison(HOSTILE))):
        assert "<script>alert" not in page
        assert "<img" not in page
        assert html.escape("<img src=x onerror=alert(2)>") in page
        assert not re.search(r"[\x00-\x08\x0e-\x1f]", page)


def test_even_rates_are_said_to_be_even() -> None:
    text = words(render(run(4, method="wanda")))
    assert "All have the same rate, 50.0%" in text
    assert "all 50.0%" in text
    assert "against Wanda" not in text.lower()


def test_experts_without_tokens_are_named() -> None:
    text = words(render(RUNS["moe"]()))
    assert "Block 3, mlp.experts.down_proj" in text
    assert "experts 3, 7" in text


@pytest.mark.parametrize("name", RUNS)
def test_card(name: str) -> None:
    record = RUNS[name]()
    card = model_card(record)
    _, front, body = card.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "transformers"
    assert meta["tags"] == ["pruned", "sparse", "besa"]
    assert meta["base_model"]
    assert "<script>alert(1)" not in body.split("```sh")[0]
    assert formatting.percent(record["sparsity"]["achieved"], 2) in body
    assert "AutoModelForCausalLM.from_pretrained" in body
    assert "besa prune" in body
    assert body.count("```") == 4
    assert "/data/" not in card, "a private folder is published"


def test_card_names_the_hub_model() -> None:
    assert yaml.safe_load(model_card(run())[4:].split("---")[0])["base_model"] == (
        "example-org/Llama-3-8B"
    )
    cached = "/home/me/.cache/huggingface/hub/models--org--Name-7b/snapshots/abc"
    assert names.hub_id(cached) == "org/Name-7b"
    assert names.hub_id("/models/Name-7b") is None
    assert names.short_name("/models/Name-7b/") == "Name-7b"


@pytest.mark.parametrize("make", [model_card, render])
def test_private_folders_stay_private(make: Callable[[dict[str, Any]], str]) -> None:
    record = run(1, model="/home/me/Name-7b")
    record["settings"]["model"] = record["model"]
    record["settings"]["calibration"] = "/home/me/texts.jsonl"
    before = json.dumps(record)
    made = make(record)
    assert "/home" not in made
    assert "besa prune Name-7b" in made
    assert "texts.jsonl" in made
    assert json.dumps(record) == before, "besa.json keeps the whole path"


def test_the_comparison_keeps_private_folders_private() -> None:
    page = render_comparison(comparison("/home/me/Name-7b"))
    assert "/home" not in page
    assert "Name-7b" in page


def test_command_repeats_the_run() -> None:
    record = run(1, model="a b")
    record["settings"].update(out="there", threads=2, model_fingerprint="f00")
    line = figures.command(read_run(record))
    assert "f00" not in line
    assert line.startswith("besa prune 'a b' --method besa --sparsity 0.5")
    assert line.endswith("--out PRUNED")
    assert "None" not in line


def test_experts_are_gathered() -> None:
    table = figures.grid(read_run(run(1, MIXTRAL)).blocks)
    assert "block_sparse_moe.experts.*.w1" in table
    assert len(table) == 7
    assert list(figures.grid(read_run(run(1, LLAMA)).blocks)) == list(LLAMA)


def test_quantiles() -> None:
    cell = Cell(sparsity=0.5, weights=100, low=0.2, high=0.79, histogram=(0, 10, 10, 10, 0))
    assert figures.quantile(cell, 0.5) == pytest.approx(0.5)
    assert figures.quantile(cell, 0.0) == pytest.approx(0.2)
    assert figures.quantile(cell, 1.0) == pytest.approx(0.79)
    spike = Cell(sparsity=0.5, weights=8, low=0.5, high=0.5, histogram=(0, 8))
    assert {figures.quantile(spike, q) for q in (0, 0.3, 1)} == {0.5}


def test_colours_are_even_around_the_target() -> None:
    levels = [palette.level(0.5 + d, 0.5, 0.1) for d in (-1, -0.1, 0, 0.1, 1)]
    assert levels == [0, 0, 10, 20, 20]
    picture = heat.heatmap({"a": [0.4, None], "b": [0.5, 0.6]}, ["0", "1"], target=0.5, width=900)
    cells = re.findall(r'class="h(\d+)"', picture)
    assert sorted(map(int, cells)) == [0, 10, 20]


def test_ticks() -> None:
    assert svg.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.log_ticks(20, 200, 6) == [20, 30, 50, 70, 100, 200]
    assert svg.every(80, 800, 26) == 5
    assert svg.short(-0.001) == "0"


# In a browser

PAGES = ("llama", "70b", "gpt2", "mixtral", "hostile", "comparison")


@pytest.fixture(scope="module", params=["light", "dark"])
def visited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, Any], str]:
    """Whether it is dark, what every page saw of itself, and the console."""
    pages = {
        name: render_comparison(comparison()) if name == "comparison" else render(RUNS[name]())
        for name in PAGES
    }
    dark = request.param == "dark"
    return dark, *visit(pages, tmp_path_factory.mktemp("pages"), dark)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page_in_a_browser(
    visited: tuple[bool, dict[str, Any], str], name: str, width: int
) -> None:
    dark, pages, console = visited
    check(pages[f"{name}-{width}"], console, dark, width)
