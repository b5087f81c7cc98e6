"""These tests run on request, by `make test-integrations`: each engine is installed for them, which takes minutes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.environment import ROOM, environment, lacks_room


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[str]], Path]:
    """The python of an environment with these packages; removed at the end with all temporary folders."""
    if os.environ.get("VGS_TEST_INTEGRATIONS") != "1":
        pytest.skip("other engines are installed and tested by `make test-integrations`")
    folder = tmp_path_factory.mktemp("engines")
    if lacks_room(folder):
        pytest.skip(f"less than {ROOM >> 30} GiB are free where temporary files lie, too little to install an engine")
    return lambda name, packages: environment(folder / name, packages)
