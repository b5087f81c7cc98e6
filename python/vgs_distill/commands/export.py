"""`vgs export`: the model of a run in a folder of its own, without what only training needs.

A plain copy takes the weights as they are, an adapter's too; with `merge` an adapter is added to the weights of the
model it belongs to. The folder appears whole or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..errors import InputError
from ..models.sources import ModelSource
from ..resilience.checkpoints import last_checkpoint
from ..resilience.output_dir import check_output_dir

_KEPT = (
    "config.json", "generation_config.json", "adapter_config.json", "README.md", "LICENSE*", "*.safetensors",
    "*.safetensors.index.json", "*.py",
)  # fmt: skip


def export(run: Path, output: Path, *, merge: bool = False, trust_remote_code: bool = False) -> str:
    """Write the model in the folder `run` and its processor to `output`; return what was written, in a few words.

    Raises:
        InputError: `run` holds no model, or none with an adapter for `merge`; or `output` is taken.
    """
    if not run.is_dir():
        raise InputError(f"there is no folder {str(run)!r}; give the output folder of a run, or one of its checkpoints")
    if not list(run.glob("*.safetensors")):
        last = last_checkpoint(run)
        remedy = "give the output folder of a run" if last is None else f"export a checkpoint, such as {str(last)!r}"
        raise InputError(f"{str(run)!r} holds no model in safetensors; {remedy}")
    check_output_dir(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{str(output)!r} exists already; choose another folder")
    source = ModelSource("student", str(run), None, trust_remote_code, {"dtype": "auto"})
    source.check()
    if merge and source.base is None:
        raise InputError(f"{str(run)!r} holds a whole model, no adapter; leave out --merge")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        source.processor().save_pretrained(staging)
        if merge:
            source.load_merged().save_pretrained(staging)
        else:
            for path in (path for pattern in _KEPT for path in run.glob(pattern)):
                shutil.copy2(path, staging)
        staging.chmod(0o755)  # of a temporary folder it is 0o700
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if source.base is None or merge:
        return "a model that from_pretrained loads"
    return f"an adapter of {source.base.name!r}; --merge makes a model of it"
