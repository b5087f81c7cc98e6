"""`vgs report --watch`: the page is written anew whenever its runs have logged something."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from .log import NothingLogged, last_change
from .run import report_file, write_report

_LOOK_EVERY = 2.0  # seconds
_REST = 4.0  # times as long as the page took: a long log keeps no processor busy
_REFRESH_EVERY = 10  # seconds, of the page in a browser: time to read a completion


def watch(run_dirs: Sequence[Path], output: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Write the report now and after every change, until Ctrl-C; a run that has logged nothing yet is waited for.

    Meanwhile the page loads itself again; the one that is left at the end does not.
    """
    seen = said = None
    try:
        while True:
            start = time.monotonic()
            changed = [last_change(run_dir) for run_dir in run_dirs]
            if changed != seen:
                seen = changed
                try:
                    sentence = f"Written: {write_report(run_dirs, output, _REFRESH_EVERY)}, and again after every log"
                except NothingLogged:
                    sentence = f"Waiting for the first log, for {output or report_file(run_dirs)}"
                if sentence != said:
                    say(f"{sentence}; Ctrl-C ends it")
                    said = sentence
            time.sleep(max(_LOOK_EVERY, _REST * (time.monotonic() - start)))
    except KeyboardInterrupt:
        with suppress(NothingLogged):
            write_report(run_dirs, output)
