"""Work by kind, and the seconds that it takes at measured speeds.

>>> Work(products=2e9, moved=1e9).seconds(Speed(1e9, 1e9, 1e9, 1e7, 1e-5, 1e9))
3.0
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    Attributes:
        products: operations of products, in the computation's dtype and with a batch's tokens.
        factors: operations of Cholesky factors and inverses, float32.
        moved: bytes that operations on single numbers read and write.
        sorted: numbers, in rows.
        launch: seconds of an operation on a few numbers.
        read: bytes of a file.
    """

    products: float
    factors: float
    moved: float
    sorted: float
    launch: float
    read: float


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        products: operations of products.
        factors: operations of Cholesky factors and inverses.
        moved: bytes that operations on single numbers read and write.
        sorted: numbers that are sorted.
        launches: operations, whatever their size.
        files: bytes that are read, written or digested.
    """

    products: float = 0.0
    factors: float = 0.0
    moved: float = 0.0
    sorted: float = 0.0
    launches: float = 0.0
    files: float = 0.0

    def __add__(self, other: Work) -> Work:
        pairs = ((getattr(self, x.name), getattr(other, x.name)) for x in fields(self))
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, x.name) * times for x in fields(self)))

    @property
    def flops(self) -> float:
        return self.products + self.factors

    def seconds(self, speed: Speed) -> float:
        """One kind after the other: an estimate, for on a GPU copies run beside products."""
        return (
            self.products / speed.products
            + self.factors / speed.factors
            + self.moved / speed.moved
            + self.sorted / speed.sorted
            + self.launches * speed.launch
            + self.files / speed.read
        )
