"""The `besa` command: one thin module per subcommand, dispatched here."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn, TextIO

from besa import telemetry
from besa.errors import BesaError, BesaWarning
from besa.version import __version__

COMMANDS = ("prune", "recover", "export", "serve", "bench", "eval", "demo", "doctor")


class _Parser(argparse.ArgumentParser):
    """Bad flags are one line and exit code 2, like every other user error."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="besa", description="Prune an LLM, pack the zeros, serve them faster.")
    parser.add_argument("--version", action="version", version=f"besa {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"besa.cli.{name}")
        summary = (module.__doc__ or "").strip().split("\n")[0]
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    args, unknown = build_parser().parse_known_args(argv)
    if "engine_flags" in args:  # `besa serve` hands on what it does not know
        args.engine_flags = unknown
    elif unknown:
        words = f"unrecognized arguments: {' '.join(unknown)} (see `besa {args.command} --help`)"
        print(f"besa {args.command}: {words}", file=sys.stderr)
        return 2
    telemetry.turn_off()
    try:
        with _warnings_of(args.command):
            return int(args.run(args) or 0)
    except BesaError as error:
        print(f"besa {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `besa eval … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        words = f"the name {error.filename} is too long for this file system: give a shorter one"
        print(f"besa {args.command}: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"besa {args.command}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130


@contextmanager
def _warnings_of(command: str) -> Iterator[None]:
    """Shows besa's own warnings as a line, without the place and the source that Python adds."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, BesaWarning):
            print(f"besa {command}: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


if __name__ == "__main__":
    sys.exit(main())
