"""`vgs` in the process of the test: what it prints and its exit code."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from vgs_distill.commands.cli import run


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(arguments: Sequence[str]) -> Result:
    """Run `vgs` with these arguments; what it raises, beyond an exit, is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


def refused(command: str, *arguments: str) -> str:
    """Run a command that must end in one sentence and exit code 2, and return the sentence."""
    result = invoke([command, *arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    *before, sentence = result.stderr.splitlines()  # before it: progress bars and notices
    assert sentence.startswith("vgs: ")
    assert not any(line.startswith("vgs: ") for line in before)
    return sentence
