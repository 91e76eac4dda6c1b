"""The error that a user can cause and mend, and what is worth a warning."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class BesaError(Exception):
    """One line: what is wrong and what to do. The command line prints it and exits with 2."""


class BesaWarning(UserWarning):
    """One line: what goes on, but not as it should. The command line prints it as such."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on how to go on."""


@contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Turns Ctrl-C inside into `Interrupted`, also where a library makes another error of it.

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
        raise
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns whatever a library raises inside into `what` and the first line of its reason."""
    try:
        yield
    except BesaError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries raise what their many layers raise
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise BesaError(f"{what}: {lines[0]}") from None
