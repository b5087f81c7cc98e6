"""Which libraries are installed, and whether TRL is one this engine was written and tested against.

The engine overrides methods of TRL's `DistillationTrainer` that are not part of TRL's stable interface, so a version
outside the range must fail before anything runs, in one sentence, and not in the middle of a run. The standard library
only: it also says what is missing where nothing but torch is installed.
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "vgs-kernels"
TRL_MINIMUM = (1, 16)
TRL_BELOW = (1, 17)


def installed(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def install(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def trl_problem(found: str | None) -> str | None:
    """Why the engine cannot run on this version of TRL, in one sentence; None if it can."""
    supported = f"the engine needs trl >= {_dotted(TRL_MINIMUM)}, < {_dotted(TRL_BELOW)}"
    if found is None:
        return f"{supported}, which is not installed; install it with: {install('train')}"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not TRL_MINIMUM <= (int(numbers[1]), int(numbers[2])) < TRL_BELOW:
        return f"{supported}, but trl {found} is installed; install it with: {install('train')}"
    return None


def check_trl() -> None:
    """Raise ImportError, naming the supported range, unless the installed TRL lies in it."""
    problem = trl_problem(installed("trl"))
    if problem is not None:
        raise ImportError(problem)


def summary() -> str:
    """One line: this package as it was built, and what it stands on."""
    libraries = [f"{name} {found}" for name in ("torch", "transformers", "trl") if (found := installed(name))]
    own = f"{DISTRIBUTION} {installed(DISTRIBUTION) or '(not installed)'}"
    return ", ".join([own, *libraries, f"Python {platform.python_version()}"])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
