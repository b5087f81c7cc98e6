"""`python -m benchmarks.study [EXPERIMENT ...]`: run what is not on record yet, then write docs/study.md.

Resumable: a finished run is one line in the records and is not run again. `report` alone only writes the page.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from vgs_distill.demo.progress import make_display

from benchmarks.report import DOCS
from benchmarks.study import report
from benchmarks.study.plan import EXPERIMENTS, TASKS, Run
from benchmarks.study.runs import RECORDS, StudyError, append_record, read_records, work


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*EXPERIMENTS, "report"]
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=f"{', '.join(choices)} (default: all)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side, one thread each")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--list", action="store_true", help="print the runs that are left and stop")
    args = parser.parse_args(arguments)
    tasks = args.tasks.split(",")
    if unknown := sorted(set(args.names) - set(choices)) + sorted(set(tasks) - set(TASKS)):
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join([*choices, *TASKS])}")
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {args.jobs}")
    names = [name for name in EXPERIMENTS if name in (args.names or EXPERIMENTS)]
    records = read_records(args.records)
    handed_out: set[str] = set()

    def left() -> list[Run]:
        """In order. Asked anew after every run, because what tuning finds decides what comes after it."""
        planned = [run for name in names for run in EXPERIMENTS[name](records, tasks)]
        return [run for run in dict.fromkeys(planned) if run.name not in records and run.name not in handed_out]

    def next_run() -> Run | None:
        waiting = left()
        if not waiting:
            return None
        handed_out.add(waiting[0].name)
        return waiting[0]

    if args.list:
        print("\n".join(run.name for run in left()))
        return 0
    status = 0
    if left():
        try:
            with make_display(Console()) as display:

                def keep(record: dict[str, object]) -> None:
                    append_record(args.records, record)
                    records[Run(**record["run"]).name] = record  # type: ignore[arg-type]

                work(next_run, keep, display, args.jobs)
        except StudyError as error:
            print(error, file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            print("interrupted; what is finished is on record", file=sys.stderr)
            status = 130
    report.write(records, args.docs)
    return status


if __name__ == "__main__":
    sys.exit(main())
