"""What the GPU's benchmarks share: contenders that take turns, and records that survive a cut.

    record = Record(path, "cuda", seconds=100, settings={"rounds": 9})
    record.attempt({"tokens": 1}, lambda: taking_turns(dense, sparse, launches=48, rounds=9))
    record.finish()

Work on a GPU is captured in a CUDA graph, so that no time of Python's is in the figures, and all
rounds are queued before the first is waited for, so that the GPU never idles between them. The
contenders' rounds alternate; a ratio is the median of the ratios of neighbours. Without a GPU the
same functions call the work as it is: a test that it runs, not a measurement.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import conditions, one_line, spread, write_json
from torch import Tensor

Work = Callable[[], Tensor]

# When the process began, nearly: a budget of seconds has the imports in it.
STARTED = time.monotonic()

# What a stored record must have in common with this run to be continued.
SAME_CONDITIONS = ("gpu", "torch", "cpu")


class Captured:
    """Some calls in a row as one thing to replay: a CUDA graph, or on a CPU the calls themselves.

    Attributes:
        output: what the last of the calls gave, renewed by each replay.
    """

    def __init__(self, works: Sequence[Work], launches: int, device: str) -> None:
        """Goes round `works`, `launches` calls in all."""
        self.calls = [works[i % len(works)] for i in range(launches)]
        self.launches = launches
        self.graph: torch.cuda.CUDAGraph | None = None
        if torch.device(device).type == "cpu":
            self.replay()
            return
        # A first call compiles kernels, chooses among them and asks for workspaces, none of which
        # a capture allows. It runs on a stream of its own, as torch's notes on graphs ask for.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for work in works:
                work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                self.output = call()

    def replay(self) -> None:
        """All calls once; on a GPU it only queues them."""
        if self.graph is not None:
            self.graph.replay()
            return
        for call in self.calls:
            self.output = call()


def rounds_of(contenders: Sequence[Callable[[], object]], rounds: int, device: str) -> Tensor:
    """Seconds [rounds, contenders]; they take turns, and two rounds before do not count.

    Args:
        contenders: each queues its work on the current stream.
    """
    for contender in [*contenders, *contenders]:
        contender()
    if torch.device(device).type == "cpu":
        times = []
        for _ in range(rounds):
            for contender in contenders:
                started = time.perf_counter()
                contender()
                times.append(time.perf_counter() - started)
        return torch.tensor(times, dtype=torch.float64).view(rounds, -1)
    events = []
    for _ in range(rounds):
        for contender in contenders:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            contender()
            pair[1].record()
            events.append(pair)
    torch.cuda.synchronize()
    milliseconds = [begin.elapsed_time(end) for begin, end in events]
    return torch.tensor(milliseconds, dtype=torch.float64).view(rounds, -1) / 1e3


def taking_turns(dense: Captured, sparse: Captured, rounds: int, device: str) -> dict[str, Any]:
    """Microseconds a call of both, and by how many times the sparse one is faster."""
    return compared(rounds_of([dense.replay, sparse.replay], rounds, device), sparse.launches)


def compared(seconds: Tensor, calls: int = 1) -> dict[str, Any]:
    """The figures of [rounds, 2] seconds of `calls` calls each: the dense ones, the sparse ones."""
    dense, sparse = (seconds / calls * 1e6).unbind(1)
    return {
        "dense_us": spread(dense.tolist()),
        "us": spread(sparse.tolist()),
        "times_dense": spread((dense / sparse).tolist()),
    }


def copy_bandwidth(device: str, nbytes: int) -> float:
    """Bytes a second that a copy reads and writes: what any kernel may hope for."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = rounds_of([lambda: target.copy_(source)], 7, device)
    return 2 * nbytes / float(seconds.median())


def relative_error(output: Tensor, expected: Tensor) -> float:
    """||output - expected|| / ||expected||; infinite if there is a NaN."""
    difference = (output.float() - expected.float()).norm() / expected.float().norm()
    return float(difference.nan_to_num(nan=torch.inf))


def allocated(device: str) -> int:
    """Bytes that torch handed out on the GPU and that are still held; 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else 0


class Record:
    """A part's JSON file: its conditions, and a row for each case, written after each.

    A run that was cut off is continued: cases that the file has are not measured again, if it is
    of the same GPU, torch and settings. A case that fails leaves a row with `failed`, the error,
    and the next run tries it again.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        seconds: float,
        settings: Mapping[str, Any],
        resume: bool = True,
    ) -> None:
        self.path, self.device = path, device
        self.deadline = STARTED + seconds
        self.result: dict[str, Any] = {
            "conditions": conditions(device),
            "settings": dict(settings),
            "finished": False,
            "rows": [],
        }
        self.left_out = 0
        # torch may collect garbage before each capture; not among all that was imported.
        gc.freeze()
        if not resume:
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        if self._shared(stored) == self._shared(self.result):
            self.result["rows"] = stored["rows"]

    @staticmethod
    def _shared(result: Mapping[str, Any]) -> list[Any]:
        there = result.get("conditions", {})
        return [*(there.get(name) for name in SAME_CONDITIONS), result.get("settings")]

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.result["rows"]
        return rows

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def has(self, case: Mapping[str, Any]) -> bool:
        return any("failed" not in row and row.items() >= case.items() for row in self.rows)

    def attempt(self, case: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> None:
        """Adds the case's row, unless it is there or the time is up.

        Raises:
            SystemExit: the GPU answers no more, so that nothing after this can be measured.
        """
        if self.has(case):
            return
        if self.late():
            self.left_out += 1
            return
        try:
            row = {**case, **measure()}
        except Exception as error:  # noqa: BLE001 - the other cases have their turn
            traceback.print_exc()
            row = {**case, "failed": one_line(error)}
        self.result["rows"] = [old for old in self.rows if not old.items() >= case.items()]
        self.rows.append(row)
        write_json(self.path, self.result, quiet=True)
        print(*(f"{name}={_short(value)}" for name, value in row.items()), flush=True)
        if "failed" in row:  # by now the exception is gone, and the tensors of its frames with it
            self._free()

    def _free(self) -> None:
        gc.collect()
        if torch.device(self.device).type == "cpu":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise SystemExit(f"the GPU answers no more: {error}") from error

    def finish(self) -> None:
        """Says in the file whether every case had its turn.

        Raises:
            SystemExit: a case failed or was wrong.
        """
        self.result["finished"] = self.left_out == 0
        self.result["left_out"] = self.left_out
        write_json(self.path, self.result)
        if self.left_out:
            print(f"{self.left_out} cases left out: the time was up. Run it again for them.")
        bad = [row for row in self.rows if "failed" in row or not row.get("right", True)]
        if bad:
            raise SystemExit(f"{len(bad)} of {len(self.rows)} cases failed or were wrong")


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
