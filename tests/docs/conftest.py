"""The stage of the documentation's commands, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cloud_server import Cloud, say
from stage import Stage, furnish


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The folder, made once; it is the current one while a test uses it."""
    folder = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch, Cloud(say("ok")) as cloud:
        patch.setenv("AUTOGLM_GGUF_CACHE", str(folder / "cache"))
        patch.setenv("CLOUD_KEY", "secret")
        patch.delenv("AUTOGLM_GGUF_API_KEY", raising=False)
        furnish(folder)
        made = Stage(folder, cloud)
        yield made
        made.close()
