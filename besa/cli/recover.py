"""Train a pruned model as a whole towards the dense one; its zeros stay.

besa recover PRUNED --teacher DENSE --out RECOVERED --text my-texts.jsonl

PRUNED is what `besa prune` wrote. An interrupted run goes on when the same command is typed again.
"""

from __future__ import annotations

import argparse
import sys

from besa.processes.launch import launch_of
from besa.recovery.config import RecoverConfig
from besa.settings import add_flags, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pruned", metavar="PRUNED", help="pruned model's directory or hub id")
    add_flags(parser, RecoverConfig)


def run(args: argparse.Namespace) -> int:
    config = RecoverConfig(**given(RecoverConfig, args))

    from besa.progress import duration, steps_for
    from besa.recovery.recover import recover

    with steps_for(sys.stderr) as tell:
        recovery = recover(args.pruned, config, tell)
    if not launch_of().leads:
        return 0
    print(
        f"{config.out}: divergence from {config.teacher} on held-out samples "
        f"{recovery.before:.4f} -> {recovery.after:.4f} nats a token, after {recovery.tokens:,} "
        f"tokens in {duration(recovery.seconds)}"
    )
    return 0
