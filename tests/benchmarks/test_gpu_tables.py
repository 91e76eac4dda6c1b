"""The tables of docs/gpu.md, from files such as a GPU leaves, and from none."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.conftest import ROOT

CONDITIONS = {"cpu": "a CPU", "gpu": "NVIDIA H100", "torch": "2.11", "transformers": "5.17"}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def spread(median):
    return {"median": median, "min": median * 0.9, "max": median * 1.1, "runs": 3}


def times(ratio):
    return {"dense_us": spread(20.0), "us": spread(20.0 / ratio), "times_dense": spread(ratio)}


def product(kind, shape, tokens, ratio, **more):
    row = {"kind": kind, "shape": shape, "tokens": tokens, **times(ratio)}
    return {**row, "bytes_of_dense": 0.57, "right": True, **more}


def step(what, kind, ratio, **case):
    rates = {"dense_tokens_a_second": 100.0, "tokens_a_second": 100 * ratio}
    return {"what": what, "kind": kind, **case, **times(ratio), **rates, "right": True}


RECORDS = {
    "kernels": {
        "finished": False,
        "rows": [
            product("50%", "4096x4096", 1, 2.0),
            product("50%", "4096x4096", 8, 1.0),
            product("int8 50%", "4096x4096", 1, 2.5, right=False),
            product("50%", "11008x4096", 1, 4.0),
            {"kind": "int8 50%", "shape": "11008x4096", "tokens": 1, "failed": "no memory"},
        ],
    },
    "decode-llama-7b": {
        "finished": True,
        "settings": {"shape": {"name": "llama-7b", "layers": 32}, "context": 512},
        "rows": [
            {
                "what": "model",
                "kind": "50%",
                "bytes_of_dense": 0.5,
                "dense_bytes": 2**34,
                "right": True,
            },
            step("decode", "50%", 1.5, batch=1),
            step("decode", "2:4", 2.0, batch=1),
            step("prompt", "50%", 1.0, tokens=1024),
        ],
    },
    "pruning": {
        "finished": True,
        "shape": {"name": "llama-7b"},
        "samples": 8,
        "tokens": 2048,
        "methods": [
            {
                "method": "besa row",
                "pattern": "unstructured",
                "seconds": spread(2.0),
                "peak_extra_bytes": 2**30,
            }
        ],
    },
    "allocation-cuda": {
        "results": [
            {
                "shape": "llama-7b",
                "dtype": "bfloat16",
                "mask": {
                    "seconds": {"dense": spread(0.4), "besa": spread(0.1)},
                    "speed_up": 4.0,
                    "memory_share": 0.2,
                },
                "step": {"speed_up": 2.0, "memory_share_beyond_activations": 0.25},
            }
        ]
    },
}


def rendered(folder, **records):
    import gpu_tables

    for name, record in records.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"conditions": CONDITIONS, **record}))
    return gpu_tables.gpu_tables(folder)


def test_without_files_there_is_one_sentence(tmp_path):
    assert rendered(tmp_path) == (
        "No GPU has been measured with this version yet: `benchmarks/gpu.sh` does it."
    )
    assert "No GPU" in rendered(tmp_path / "none")


def test_all_tables(tmp_path):
    lines = rendered(tmp_path, **RECORDS).splitlines()
    for line in (
        "| 4096 × 4096, times F.linear | F.linear | 50% | int8 50% |",
        "| 1 token | 20.0 µs | 10.0 µs, 2.00× (1.80–2.20) | – |",
        "| 8 tokens | 20.0 µs | 20.0 µs, no difference (0.90–1.10) | – |",
        "| 11008 × 4096 | 20.0 µs | 5.0 µs, 4.00× (3.60–4.40) | – |",
        "| LLaMA-7B's shape, 1 at a time | 100.0/s | 150.0/s, 1.50× (1.35–1.65) "
        "| 200.0/s, 2.00× (1.80–2.20) |",
        "| LLaMA-7B's shape, a prompt of 1024 | 100.0/s | 100.0/s, no difference (0.90–1.10) | – |",
        "| LLaMA-7B's shape, memory | 16.0 GiB | 8.0 GiB, 0.50 of dense | – |",
        "| BESA, rates by row, unstructured | 2.00 s (1.80–2.20) | 1024 MiB |",
        "| LLaMA-7B, bfloat16 | 400 ms | 100 ms | 4.0× | 0.20 of it | 2.0× | 0.25 of it |",
    ):
        assert line in lines
    assert "NVIDIA H100, torch 2.11, transformers 5.17." in lines[-1]
    assert lines[-1].endswith("Some cases were left out: the time was up.")
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") > 2 for line in tables)


def test_each_table_is_of_one_width(tmp_path):
    for table in rendered(tmp_path, **RECORDS).split("\n\n")[:-1]:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_parts_may_be_missing(tmp_path):
    text = rendered(tmp_path, pruning=RECORDS["pruning"])
    assert "F.linear |" not in text
    assert "SparseGPT" not in text
    assert "left out" not in text
