"""Checks, at import of the engine, that the installed TRL is one this engine was written and tested against.

The engine overrides methods of TRL's `DistillationTrainer` that are not part of TRL's stable interface, so a version
outside the range must fail here, in one sentence, and not in the middle of a run.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TRL_MINIMUM = "1.16.0"
TRL_BELOW = "1.17.0"


def check_trl(installed: str | None = None) -> None:
    """Raise ImportError, naming the supported range, unless the installed TRL lies in it."""
    supported = f"vgs_distill supports trl >= {TRL_MINIMUM}, < {TRL_BELOW}"
    remedy = "install it with: pip install 'vgs-kernels[train]'"
    if installed is None:
        try:
            installed = version("trl")
        except PackageNotFoundError:
            raise ImportError(f"{supported}, but trl is not installed; {remedy}") from None
    if not Version(TRL_MINIMUM) <= Version(installed) < Version(TRL_BELOW):
        raise ImportError(f"{supported}, but trl {installed} is installed; {remedy}")
