"""The error that a user can cause and mend, and what is worth a warning."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What is raised where code meets an object that it was not written for.
_OF_THE_CODE = (TypeError, AttributeError, LookupError, AssertionError, NameError, RecursionError)

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    """Text as one line of a terminal: what would break or colour it is spelt out.

    A file's or a tensor's name may hold anything.

    >>> printable("up\\x1b[2J\\nproj")
    'up\\\\x1b[2J\\\\nproj'
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def check_name(path: object) -> None:
    """Raises a BesaError for a path whose bytes are no text: safetensors does not open it."""
    if any("\ud800" <= each <= "\udfff" for each in str(path)):
        raise BesaError(f"{path} has a name that is not UTF-8: rename it")


class BesaError(Exception):
    """One line: what is wrong and what to do. The command line prints it and exits with 2."""


class PeerLostError(Exception):
    """Another process of the group ended, and this one cannot go on without it."""


class BesaWarning(UserWarning):
    """One line: what goes on, but not as it should. The command line prints it as such."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on how to go on."""


@contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Turns Ctrl-C inside into `Interrupted`, also where a library makes another error of it.

    The end of another process of the group gets the same word on how to go on.

    torch, for one, asks a sequence for its length, and whatever comes of it is a ValueError.
    """
    pressed = False

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    # Only the main thread may choose, and a handler that someone else chose is to stay.
    usual = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except BaseException as error:
        if pressed or isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {how_to_go_on}") from None
        if isinstance(error, PeerLostError):
            raise PeerLostError(f"{error}; {how_to_go_on}") from error
        raise
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns whatever a library raises inside into `what` and the first line of its reason."""
    try:
        yield
    except (BesaError, PeerLostError):
        raise
    except Exception as error:  # noqa: BLE001 - libraries raise what their many layers raise
        raise BesaError(f"{what}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """Why a library failed, for people: the first line of its own words, without colours.

    What speaks of the library's own objects tells a user nothing, and is said in plain words.

    >>> reason_of(KeyError("rope_theta")), reason_of(ValueError("no such\\nmodel"))
    ('it lacks rope_theta', 'no such')
    >>> reason_of(FileNotFoundError(2, "No such file or directory", "a.json"))
    'a.json: No such file or directory'
    """
    if isinstance(error, UnicodeError):
        return "it is not UTF-8"
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"it lacks {error.args[0]}"
    if isinstance(error, _OF_THE_CODE):
        return "it has another form than the library that reads it knows"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = _COLOURS.sub("", str(error)).strip()
    return text.splitlines()[0] if text else "the library that reads it gives no reason"
