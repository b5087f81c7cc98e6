"""gamma over a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from vgs_distill import VGSConfig
from vgs_distill.steering.schedule import gamma_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.9, 0.9, 0.9, 0.9, 0.9]),
        ("linear", [0.5, 0.6, 0.7, 0.8, 0.9]),
        ("cosine", [0.5, 0.5585786, 0.7, 0.8414214, 0.9]),
    ],
)
def test_schedules(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    config = VGSConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gamma=0.9, gamma_start=0.5, gamma_schedule=schedule
    )
    assert [gamma_at(config, step, 5) for step in range(5)] == pytest.approx(expected)
    assert gamma_at(config, 0, 1) == 0.9
    assert gamma_at(config, 7, 5) == pytest.approx(0.9)
