"""The measure of a whole pruning run on a GPU runs on the CPU, too."""

from __future__ import annotations

from tests.benchmarks.conftest import Benchmark


def test_gpu_pipeline(benchmark: Benchmark):
    result = benchmark("gpu_pipeline", "--device", "cpu", "--runs", "1")
    (model,) = result["models"]
    assert len(model["blocks"]) == 2
    for block in model["blocks"]:
        assert min(block["phases"].values()) >= 0
    last = model["blocks"][-1]["seconds"]
    assert model["seconds_a_block"] > last  # with 128 samples instead of 9
    assert model["seconds_a_model"] > 4 * last
    assert {"on the GPU", "pinned, overlapped"} < result["copies"]["seconds"].keys()
