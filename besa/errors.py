"""The error that a user can cause and mend, and what is worth a warning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BesaError(Exception):
    """One line: what is wrong and what to do. The command line prints it and exits with 2."""


class BesaWarning(UserWarning):
    """One line: what goes on, but not as it should. The command line prints it as such."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on how to go on."""


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
