from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.recorded_run import finished_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "my run")
