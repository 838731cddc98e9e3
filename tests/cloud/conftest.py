"""Settings of the asynchronous tests of this room."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
