"""docs/study.md from the records."""

from pathlib import Path
from benchmarks import harness

DOCS = harness.REPOSITORY / "docs"


def write(records, docs: Path) -> None: ...
