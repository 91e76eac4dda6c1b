"""The stream between blocks: what is read is what was last set, whenever copies happen to run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from besa.errors import BesaWarning
from besa.pruning import activations, transfers
from besa.pruning.activations import Activations
from besa.pruning.transfers import StagedCopies, copies_for

SHAPES = [torch.Size([1, 3, 4])] * 6 + [torch.Size([1, 2, 4])]


@dataclass(eq=False)
class Job:
    """A queued copy; a queue runs in order, as a stream does."""

    queue: list[Job]
    work: Callable[[], object]

    def synchronize(self) -> None:
        while self in self.queue:
            self.queue.pop(0).work()


@dataclass
class FakeCopies:
    """A device that is the host's memory, whose copies run late: when somebody waits for them.

    Attributes:
        eager: reads run at once instead, after what they were told to wait for.
    """

    eager: bool
    pinned: bool = False
    inward: list[Job] = field(default_factory=list)
    outward: list[Job] = field(default_factory=list)
    most_leaving: int = 0
    reads: list[int] = field(default_factory=list)

    def read(self, host: Tensor, after: Job | None = None) -> tuple[Tensor, Job]:
        self.reads.append(host.data_ptr())
        tensor = torch.full_like(host, torch.nan)

        def work() -> None:
            if after is not None:
                after.synchronize()
            tensor.copy_(host)

        job = self._queued(self.inward, work)
        if self.eager:
            job.synchronize()
        return tensor, job

    def take(self, tensor: Tensor, arrived: Job) -> Tensor:
        arrived.synchronize()
        return tensor

    def write(self, value: Tensor, host: Tensor) -> Job:
        kept = value.clone()
        job = self._queued(self.outward, lambda: host.copy_(kept))
        self.most_leaving = max(self.most_leaving, len(self.outward))
        return job

    def computed(self) -> Job:
        return Job([], lambda: None)

    @staticmethod
    def _queued(queue: list[Job], work: Callable[[], object]) -> Job:
        job = Job(queue, work)
        queue.append(job)
        return job


def made_of(copies: object, directory: Path | None = None) -> tuple[Activations, list[Tensor]]:
    """A stream, and the tensors that it is to hold."""
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in SHAPES]
    return Activations.of(values, torch.float32, directory, "stream", copies), values


def copies_of(kind: str) -> tuple[object, FakeCopies]:
    fake = FakeCopies(eager="eager" in kind)
    buffers = [torch.empty(16) for _ in range(4)]
    return (StagedCopies(fake, buffers) if "staged" in kind else fake), fake


KINDS = ["eager", "late", "staged eager", "staged late"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_reads_give_what_was_last_set(kind: str, disk: bool, seed: int, tmp_path: Path):
    copies, fake = copies_of(kind)
    stream, values = made_of(copies, tmp_path if disk else None)
    chance = random.Random(seed)
    for _ in range(300):
        i = chance.randrange(len(values))
        match chance.choice(["read", "read", "set", "expect", "settle"]):
            case "read":
                assert torch.equal(stream[i], values[i])
            case "set":
                values[i] = torch.randn(values[i].shape)
                stream[i] = values[i]
            case "expect":
                order = [chance.randrange(len(values)) for _ in range(chance.randrange(5))]
                stream.expect(order)
                for j in order[: chance.randrange(5)]:
                    assert torch.equal(stream[j], values[j])
                    if chance.random() < 0.5:
                        stream[j] = values[j] = values[j] + 1
            case "settle":
                stream.settle()
                assert all(map(torch.equal, stream.tensors, values))
    stream.settle()
    assert all(map(torch.equal, stream.tensors, values))
    assert fake.most_leaving <= 5
    stream.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["eager", "late"])
def test_the_expected_order_is_read_ahead_and_once(kind: str):
    copies, fake = copies_of(kind)
    stream, values = made_of(copies)
    place = {tensor.data_ptr(): i for i, tensor in enumerate(stream.tensors)}
    order = [3, 0, 6, 1, 5, 2, 4]
    stream.expect(order)
    for done, i in enumerate(order, start=1):
        assert torch.equal(stream[i], values[i])
        assert [place[read] for read in fake.reads] == order[: done + 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("disk", [False, True])
def test_a_gpu_reads_what_was_last_set(disk: bool, tmp_path: Path):
    device = torch.device("cuda")
    values = [torch.full((1, 2048, 4096), float(i), dtype=torch.bfloat16) for i in range(12)]
    directory = tmp_path if disk else None
    stream = Activations.of(values, torch.bfloat16, directory, "stream", copies_for(device))
    assert stream.tensors[0].is_pinned() != disk
    weight = torch.eye(4096, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        for order in (range(12), torch.randperm(12).tolist()):
            stream.expect(order)
            for i in order:
                # Work that takes longer than a copy, whose result is freed at once.
                stream[i] = stream[i] @ weight @ weight @ weight + 1
    stream.settle()
    assert [int(tensor.unique()) for tensor in stream.tensors] == [i + 6 for i in range(12)]


def test_without_copies_the_host_has_the_elements():
    stream, values = made_of(None)
    stream.expect([2, 1])
    stream[0] = values[0] + 1
    assert stream[0] is stream.tensors[0]
    assert torch.equal(stream[-1], values[-1])
    assert torch.equal(stream[0], values[0] + 1)
    assert copies_for(torch.device("cpu")) is None


def test_the_targets_share_the_streams_copies():
    copies, _ = copies_of("staged late")
    stream, values = made_of(copies)
    targets = Activations.like(stream, 2, "dense")
    targets[1] = values[1]
    assert [t.shape for t in targets.tensors] == SHAPES[:2]
    assert targets.copies is stream.copies
    assert torch.equal(targets[1], values[1])


def test_a_system_that_pins_nothing_is_told_and_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "pinned", lambda shapes, dtype: None)
    fake = FakeCopies(eager=False, pinned=True)
    with pytest.warns(BesaWarning, match=r"does not pin 0\.0 GB of memory"):
        stream, values = made_of(fake)
    assert stream.copies is fake  # not even buffers could be pinned
    assert torch.equal(stream[3], values[3])


def test_memory_that_is_not_pinned_goes_through_buffers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def ordinary(shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape in shapes]

    monkeypatch.setattr(transfers, "pinned", ordinary)
    stream, values = made_of(FakeCopies(eager=False, pinned=True), tmp_path)
    assert isinstance(stream.copies, StagedCopies)
    assert [len(buffer) for buffer in stream.copies.buffers] == [12] * 4
    assert all(torch.equal(stream[i], value) for i, value in enumerate(values))


def test_pinned_memory_comes_in_large_pieces(monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    empty = torch.empty

    def ordinary(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        made.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(transfers, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(torch, "empty", ordinary)
    shapes = [torch.Size(shape) for shape in ([2, 5], [3, 3], [40], [1, 6], [25])]
    tensors = transfers.pinned(shapes, torch.float32)
    assert tensors is not None
    assert [t.shape for t in tensors] == shapes
    assert made == [19, 40, 6, 25]  # of 4 bytes: at most 100 bytes, or one tensor


def test_pinned_memory_that_is_refused(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> Tensor:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    assert transfers.pinned(SHAPES, torch.float32) is None
