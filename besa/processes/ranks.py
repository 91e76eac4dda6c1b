"""The processes that share one command's work: what they add up and tell each other.

    torchrun --nproc-per-node 2 -m besa prune MODEL --out pruned

Each has a part of the samples. What it sums over its part is summed over all of them, by
torch.distributed: gloo on CPUs, NCCL on GPUs. One process alone is the same code, for which every
function here comes back at once.

>>> with joined() as ranks:
...     total = torch.tensor([1.0, 2.0])
...     ranks.sum_(total)
...     words = ranks.from_leader(lambda: "written")
>>> total, words, ranks.size
(tensor([1., 2.]), 'written', 1)

A process that fails ends, and so torchrun ends the others. Those that wait for it meanwhile raise
`PeerLostError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from besa.errors import BesaError, PeerLostError
from besa.processes.launch import Launch, launch_of, store

T = TypeVar("T")
Items = TypeVar("Items", Sequence[Any], Tensor)

# Process 0 may write or rotate alone for long while the others wait. A process that ends is noticed
# at once; this is for a machine that falls silent.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work, as one of them sees them."""

    launch: Launch = field(default_factory=Launch)

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.launch.size

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which writes and shows progress."""
        return self.launch.leads

    def share(self, items: Items) -> Items:
        """This process's part of items that are dealt out in turn."""
        return items[self.rank :: self.size]

    def evened(self, count: int) -> int:
        """So many items or more that each process gets as many of them."""
        return -(-count // self.size) * self.size

    def deal(self, costs: Sequence[float]) -> list[int]:
        """The process that does each piece of work, the dearest dealt first."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[place] = loads.index(min(loads))
            loads[owners[place]] += costs[place]
        return owners

    def sum_(self, *tensors: Tensor) -> None:
        """Each becomes its sum over all processes, the same bits everywhere.

        Args:
            tensors: in the same order, of the same shapes and dtypes, everywhere.
        """
        if self.size > 1:
            with _losing_peers():
                _wait_for(dist.all_reduce(x, async_op=True) for x in tensors)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """The gradients become their sums; where no process has one, there is none."""
        if self.size == 1:
            return
        owners = torch.tensor([x.grad is not None for x in parameters], dtype=torch.int32)
        self.sum_(owners)
        found = [x for x, count in zip(parameters, owners.tolist(), strict=True) if count]
        gradients = []
        for parameter in found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.sum_(*gradients)

    def broadcast_(self, *tensors: Tensor, source: int = 0) -> None:
        """Each becomes what it is in process `source`, byte by byte."""
        self.exchange_((x, source) for x in tensors)

    def exchange_(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Each becomes what it is in the process beside it, byte by byte; all are contiguous."""
        if self.size > 1:
            with _losing_peers():
                _wait_for(
                    # gloo knows neither bool nor bfloat16.
                    dist.broadcast(_bytes(x), source, async_op=True)
                    for x, source in tensors
                    if x.numel()
                )

    def gather(self, value: T) -> list[T]:
        """The value of each process, in their order."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with _losing_peers():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What process 0 makes, for all of them; the others wait.

        Raises:
            BesaError: everywhere, if making it does.
        """
        if self.size == 1:
            return make()
        made: list[T | BesaError | None] = [None]
        if self.leads:
            try:
                made = [make()]
            except BesaError as error:
                made = [error]
        with _losing_peers():
            dist.broadcast_object_list(made, 0, device=torch.device("cpu"))
        (answer,) = made
        if isinstance(answer, BesaError):
            raise answer
        return answer  # type: ignore[return-value]

    def device(self, name: str | None) -> str | None:
        """The device for this process by the user's word: of several GPUs, each has its own.

        Raises:
            BesaError: there are fewer GPUs on this machine than processes.
        """
        if self.size == 1 or name == "cpu" or (name is None and not torch.cuda.is_available()):
            return name
        if name not in (None, "cuda"):
            raise BesaError(f"--device {name}: with several processes give cuda or cpu")
        if self.launch.local_size > torch.cuda.device_count():
            raise BesaError(
                f"{self.launch.local_size} processes share {torch.cuda.device_count()} GPUs: lower "
                "--nproc-per-node, or give --device cpu"
            )
        torch.cuda.set_device(self.launch.local_rank)
        return f"cuda:{self.launch.local_rank}"


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started with this one, connected while inside."""
    launch = launch_of()
    if launch.size == 1:
        yield ALONE
        return
    ours = not dist.is_initialized()
    if ours:
        with _losing_peers():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=store(_PATIENCE),
                rank=launch.rank,
                world_size=launch.size,
                timeout=_PATIENCE,
            )
    yield Ranks(launch)
    # After an error the others may be gone, and the end of this process frees what there is.
    if ours:
        dist.destroy_process_group()


def _bytes(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()  # of another one this would be a copy
    return tensor.view(-1).view(torch.uint8)


def _wait_for(works: Iterable[dist.Work | None]) -> None:
    for work in list(works):
        if work is not None:
            work.wait()


@contextmanager
def _losing_peers() -> Iterator[None]:
    """Turns what torch.distributed raises when another process is gone into `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError("another process of the group ended") from error
