"""Loads the decoder's next block on a thread while the one before is worked on.

>>> from besa.model.checkpoint import Checkpoint
>>> with LoadAhead(Checkpoint.open("path/to/model").load_block) as loading:
...     first = loading.take(0)     # was not begun: is loaded now
...     loading.begin(1)            # comes back at once
...     second = loading.take(1)    # waits for what is left to do
>>> type(second).__name__
'LlamaDecoderLayer'
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

LoadBlock = Callable[[int], nn.Module]


class LoadAhead:
    """At most one block ahead. What goes wrong on the thread is raised where its block is taken."""

    def __init__(self, load: LoadBlock) -> None:
        self.load = load
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="next-block")
        self.begun: tuple[int, Future[nn.Module]] | None = None

    def __enter__(self) -> LoadAhead:
        return self

    def __exit__(self, *raised: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def begin(self, index: int) -> None:
        """Starts to load a block. The one before has to be taken by now."""
        assert self.begun is None
        self.begun = index, self.pool.submit(self.load, index)

    def take(self, index: int) -> nn.Module:
        """A block that is loaded; waits for it, or loads it now if it was not begun.

        Raises:
            BesaError: what loading it raises.
        """
        begun, self.begun = self.begun, None
        if begun is None:
            return self.load(index)
        assert begun[0] == index
        return begun[1].result()

    def drop(self) -> None:
        """Waits for the block that was begun, if any, and forgets it and its error."""
        begun, self.begun = self.begun, None
        if begun is not None:
            begun[1].exception()
