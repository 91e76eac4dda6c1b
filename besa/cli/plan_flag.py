"""`--plan`: what a command would take. It needs no --out, as nothing is written."""

from __future__ import annotations

import argparse
from typing import Any

from besa.errors import BesaError

# Where a plan looks for room on the disk if --out does not say.
_HERE = "output"


def add_plan_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--plan`, and leaves it to `with_out` to ask for `--out`."""
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say what it would take of memory, disk and time, and end (exit code 3: it won't fit)",
    )
    for action in parser._actions:
        if action.dest == "out":
            action.required = False


def with_out(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given; a plan's have an `out` in any case.

    Raises:
        BesaError: `--out` is not given, and it is not a plan.
    """
    if "out" in settings:
        return settings
    if not args.plan:
        raise BesaError("the following arguments are required: --out")
    return {**settings, "out": _HERE}
