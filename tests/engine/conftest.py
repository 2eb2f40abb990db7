"""What tests of the engine share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.engine.fleet_pair import Pair


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    made = Pair(getattr(request, "param", {}))
    await made.fleet.start()
    yield made
    made.open()
    await made.fleet.close()
