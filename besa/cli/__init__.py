"""The `besa` command: one thin module per subcommand, dispatched here."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn, TextIO

from besa import telemetry
from besa.errors import BesaError, BesaWarning, PeerLostError, printable
from besa.processes.launch import first_to_speak, launch_of
from besa.version import __version__

COMMANDS = ("prune", "recover", "export", "serve", "bench", "eval", "demo", "doctor")

# Those whose work several processes can share.
SHARED = ("prune", "recover", "eval")


class _Parser(argparse.ArgumentParser):
    """Bad flags are one line and exit code 2, like every other user error."""

    def error(self, message: str) -> NoReturn:
        _say(f"{self.prog}: {message} (see `{self.prog} --help`)")
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
    _open_standard_streams()
    args, unknown = build_parser().parse_known_args(argv)
    if "engine_flags" in args:  # `besa serve` hands on what it does not know
        args.engine_flags = unknown
    elif unknown:
        words = f"unrecognized arguments: {' '.join(unknown)} (see `besa {args.command} --help`)"
        return _refused(args.command, words)
    telemetry.turn_off()
    if launch_of().size > 1 and args.command not in SHARED:
        return _refused(args.command, "it is one process's work: start it without torchrun")
    try:
        with _warnings_of(args.command):
            code = int(args.run(args) or 0)
        print(end="", flush=True)  # what cannot be written is noticed here, and not at exit
        return code
    except BesaError as error:
        return _refused(args.command, str(error))
    except PeerLostError as error:
        _say(f"besa {args.command}: {error}")
        return 1
    except BrokenPipeError:  # `besa eval … | head`
        _discard_output()
        return 1
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = error.filename
            words = f"the name {name} is too long for this file system: give a shorter one"
        elif error.filename is None and error.errno in _UNWRITABLE:
            _discard_output()
            words = f"what it found could not be printed: {error.strerror}"
        else:
            raise
        return _refused(args.command, words)
    except KeyboardInterrupt as interrupt:
        _say(f"besa {args.command}: {str(interrupt) or 'interrupted'}")
        return 130


def _say(line: str) -> None:
    """Says why the command ends, in one of the processes that share it."""
    if first_to_speak():
        print(printable(line), file=sys.stderr)


# Of a standard output that takes nothing.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)


def _refused(command: str, words: str) -> int:
    """Says the one line of a command that could not be; gives the exit code."""
    _say(f"besa {command}: {words}")
    return 2


def _open_standard_streams() -> None:
    """Has streams that whoever started besa closed lead nowhere.

    The next files that are opened, and they are a model's, would get their numbers, and whatever a
    library prints. A name that is no text is printed with its bytes spelt out.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - as long as besa runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """What is left to print goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
            if launch_of().leads:
                print(f"besa {command}: {printable(str(message))}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


if __name__ == "__main__":
    sys.exit(main())
