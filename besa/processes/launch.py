"""Which of torchrun's processes this one is, and which of them speaks.

    torchrun --nproc-per-node 2 -m besa prune MODEL --out pruned

torchrun starts the same command several times and tells each process its place in the environment
(https://docs.pytorch.org/docs/stable/elastic/run.html). All of this is known without torch, so that
a command that is refused need not import it.

>>> launch_of({})
Launch(rank=0, size=1, local_rank=0, local_size=1)
>>> told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
>>> launch_of({**told, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
Launch(rank=3, size=4, local_rank=1, local_size=2)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A process among those that share a command's work.

    Attributes:
        rank: its number, from 0; process 0 leads: it writes and shows progress.
        size: how many there are.
        local_rank, local_size: the same among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place as the environment tells it; alone where it tells of no others."""
    if not all(name in environment for name in _TOLD):
        return Launch()
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    return Launch(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", "1")))


def store(patience: timedelta) -> Store:
    """The keys and values that all processes of the launch see.

    Args:
        patience: how long to wait for it to be there, and for a key.

    Raises:
        DistNetworkError: it is not there.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    # torchrun keeps the store itself; other launchers leave that to the first process.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    there = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not kept and launch_of().leads,
        timeout=patience,
        multi_tenant=not kept,
        wait_for_workers=False,
    )
    return PrefixStore(f"besa-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", there)


def first_to_speak() -> bool:
    """Whether no other process has said yet why the command ends: that is said once."""
    launch = launch_of()
    if launch.size == 1:
        return True
    with suppress(RuntimeError, ImportError):
        return bool(store(timedelta(seconds=20)).add("spoken", 1) == 1)
    return launch.leads  # the store is gone, as on a machine that lost the others
