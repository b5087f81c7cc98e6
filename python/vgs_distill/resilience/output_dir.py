"""Whether results can be written, asked before any time is spent. Light: the demo's parent process imports no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import InputError


def check_output_dir(path: str | os.PathLike[str]) -> Path:
    """Return the directory; InputError unless it can be written to, or be made. Leaves nothing behind."""
    directory = Path(path)
    try:
        existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".vgs-write-test-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write to the output directory {str(directory)!r} ({reason}); choose another one"
        ) from None
    return directory
