"""torchrun's agent in a fork of the process that has torch imported, and so are its workers.

What `torchrun` itself adds is the reading of its flags and two fresh interpreters, which take
ten seconds.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


@dataclass(frozen=True)
class Torchrun:
    """torchrun's flags, by their names there.

    Attributes:
        is_host: of several machines, this one is that of the endpoint.
        network: the network namespace to be in, as `ip netns` names it; None: this one.
        address: of this machine there.
    """

    nproc_per_node: int = 2
    nnodes: int = 1
    max_restarts: int = 0
    rdzv_endpoint: str = "localhost:0"
    rdzv_id: str = "besa"
    is_host: bool = True
    network: str | None = None
    address: str = "localhost"


def become_agent(launch: Torchrun, arguments: Sequence[str]) -> int:
    """Runs `besa ARGUMENTS` as `torchrun` would; gives its exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if launch.network is not None:
        _join(launch.network)
    config = LaunchConfig(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=launch.nproc_per_node,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rdzv_endpoint,
        rdzv_configs={"is_host": launch.is_host},
        run_id=launch.rdzv_id,
        max_restarts=launch.max_restarts,
        monitor_interval=0.05,
        start_method="fork",
        local_addr=launch.address,
    )
    try:
        elastic_launch(config, _besa)(list(arguments))
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def workers(agent: int) -> list[psutil.Process]:
    """The processes that an agent started, by their ranks."""
    found = psutil.Process(agent).children()
    ranked = [each for each in found if each.environ().get("RANK") is not None]
    return sorted(ranked or found, key=lambda each: each.pid)


def _besa(arguments: list[str]) -> None:
    from besa.cli import main

    if code := main(arguments):
        sys.exit(code)


def _join(network: str) -> None:
    """Moves this process into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    file = os.open(Path("/run/netns") / network, os.O_RDONLY)
    if libc.setns(file, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), f"no network {network}")
    os.close(file)
