"""What the tests of all native kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from besa.kernels import linear
from besa.kernels.isa import ISAS, available


@pytest.fixture(scope="module", params=available())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """One test for each instruction set that the CPU has; none without the native library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "isa_number", lambda: ISAS.index(request.param))
        yield
