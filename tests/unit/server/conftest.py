from collections.abc import Iterator

import pytest

from tests.unit.server.running import Running, running_server


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server that tests leave as they found it."""
    with running_server() as made:
        yield made
