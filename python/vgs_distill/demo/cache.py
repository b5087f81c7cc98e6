"""Trained models kept between demo runs, keyed by the recipe that made them.

A teacher costs a minute, so it is trained once per machine. An entry is written to a temporary folder and renamed
into place, so a reader sees a whole entry or none; a manifest of checksums catches an entry damaged afterwards. A
damaged entry is rebuilt with a message: a demo must not fail over its own scratch files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = 1  # raise when code that no recipe describes (world drawing, model layout) changes what is built
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "pillow", "easy-vqa")


def cache_root() -> Path:
    """`$VGS_CACHE_DIR`, or `~/.cache/vgs-kernels`."""
    chosen = os.environ.get("VGS_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vgs-kernels"


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide which numbers a recipe gives."""
    return {name: version(name) for name in _LIBRARIES}


def entry_key(kind: str, parts: dict[str, Any]) -> str:
    """A folder name for `kind` built from `parts` (dataclasses or plain values) and the library versions."""
    plain = {name: asdict(part) if hasattr(part, "__dataclass_fields__") else part for name, part in parts.items()}
    text = json.dumps({"format": _FORMAT, "parts": plain, "libraries": library_versions()}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def fault(folder: Path) -> str | None:
    """Why `folder` cannot be used, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest.items():
            if _digest(folder / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def cached_folder(
    key: str,
    build: Callable[[Path], None],
    *,
    root: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[Path, bool]:
    """The folder of `key`, built by `build(empty_folder)` unless a sound one is there; and whether it was there.

    Two processes may build one key at the same time: the first to finish wins and both return its folder.
    """
    root = root if root is not None else cache_root()
    target = root / key
    if target.exists():
        reason = fault(target)
        if reason is None:
            return target, True
        say(f"The cached {key} is damaged: {reason}. Building it again.")
        _discard(target)
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    try:
        build(scratch)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        manifest = {path.relative_to(scratch).as_posix(): _digest(path) for path in files}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
        scratch.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            scratch.rename(target)
        except OSError:
            if fault(target) is not None:
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target, False


def _discard(folder: Path) -> None:
    """Take a damaged entry out of the way, file or folder alike."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
