"""What verl imports at its own import (entry point group `verl.plugins`): nothing, unless VERL_ENGINE_VENDOR=vgs.

verl logs a plugin that fails at debug level and trains on with its own engine, so a failure here ends the process.
"""

from __future__ import annotations

import os

if os.environ.get("VERL_ENGINE_VENDOR") == "vgs":
    try:
        from . import verl  # noqa: F401 - registers the engine
    except Exception as error:
        raise SystemExit(f"vgs: the verl engine cannot be loaded: {error}") from error
