"""verl 0.9's FSDP2 engine on `vgs_distill.integrations.verl`, by `verl_worker.py`: the gradient is plain torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.environment import ROOT, run

WORKER = str(ROOT / "tests/integrations/verl_worker.py")


@pytest.fixture(scope="module")
def verl(engine: Callable[[str, list[str]], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    python = engine("verl", ["verl==0.9.1", "uvicorn", "fastapi"])
    models = str(tmp_path_factory.mktemp("verl"))
    run(python, str(ROOT / "tests/integrations/tiny_models.py"), models, "--short")
    return lambda processes: run(python, WORKER, models, processes=processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_gradient_is_plain_torch_s(processes: int, verl: Callable[[int], str]) -> None:
    assert verl(processes).count("EQUAL") == 1
