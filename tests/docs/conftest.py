"""The stage of the documentation's commands, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cloud_server import Cloud, say
from stage import Stage, furnish


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The folder, made once, and what runs commands in it."""
    folder = tmp_path_factory.mktemp("stage")
    furnish(folder)
    with Cloud(say("ok")) as cloud:
        made = Stage(folder, cloud)
        yield made
        made.close()
