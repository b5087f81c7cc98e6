"""Another engine in an environment of its own: its packages, and by links what it may share with the running one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOM = 4 << 30  # bytes free on the disk of temporary files: an engine without torch takes about one
# Engines choose versions of these themselves, or go other ways where they find them.
OWN = (
    "trl",
    "transformers",
    "peft",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "fsspec",
    "liger",
    "vgs",
    "__edit",
)


def lacks_room(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < ROOM


def environment(folder: Path, packages: list[str]) -> Path:
    """Install the packages under `folder`, and return its python. torch and other big ones are those that run here."""
    shared = folder / "shared"
    shared.mkdir(parents=True)
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith((*OWN, "pip", "__pycache__")) and path.suffix != ".pth":
            (shared / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(str(shared))
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=900)
    return python


def run(python: Path, *command: str, processes: int = 1, **variables: str) -> str:
    """What a command prints, in the environment of `python`, on CPUs, with this repository's packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    offline = {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    result = subprocess.run(
        [str(python), *(launcher if processes > 1 else []), *command],
        cwd=ROOT, env={**os.environ, **offline, "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout
