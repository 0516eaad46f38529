"""The device that layers are offloaded to; without one these tests are skipped."""

from __future__ import annotations

import pytest

from autoglm_gguf.devices import probe_devices


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """The first GPU's name; a driver that computes on the CPU will do."""
    found = next((device.name for device in probe_devices() if device.is_gpu), None)
    if found is None:
        pytest.skip("needs a GPU that ggml can drive: make test-gpu")
    return found
