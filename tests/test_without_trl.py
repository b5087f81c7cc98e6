"""The engine where TRL and peft are not installed: its pieces work, and the trainer says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vgs_distill

ROOT = Path(__file__).parents[1]
# What an import finds where the libraries are not installed: no module, and no metadata.
HIDE = """
import importlib.metadata, sys
HIDDEN = ("trl", "peft")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
found = importlib.metadata.version
def version(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
"""
ON_TRL = {"VGSConfig", "VGSTrainer"}


def without_trl(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_every_name_but_those_of_the_trainer_is_there() -> None:
    names = sorted(set(vgs_distill.__all__) - ON_TRL)
    assert {"DecomposedLoss", "MaskedView", "Steering"} <= set(names)
    result = without_trl(
        f"import vgs_distill\nfor name in {names}: getattr(vgs_distill, name)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(HIDDEN)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("name", sorted(ON_TRL))
def test_the_trainer_says_what_to_install(name: str) -> None:
    result = without_trl(f"from vgs_distill import {name}")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        "ImportError: the engine needs trl >= 1.16, < 1.17, which is not installed; install it with: "
        "pip install 'vgs-kernels[train]'"
    )
