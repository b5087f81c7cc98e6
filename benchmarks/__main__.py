"""Every benchmark, then the report: `python -m benchmarks`, which is what `vgs bench` and `make bench` run.

Resumable: finished cases are on record and are shown, not measured again (--force measures them again).
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.harness.machine import REPOSITORY
from benchmarks.harness.records import RECORDS

# In the order of the run. `takes` are the options that the benchmark understands.
BENCHMARKS = {
    "accuracy": ("device", "quick", "force", "records"),
    "linear_reverse_kl": ("device", "quick", "force", "records"),
    "linear_decomposed_kl": ("device", "quick", "force", "records"),
    "decomposed_kl": ("device", "quick", "force", "records"),
    "sweep": ("device", "quick", "force", "records"),
    "steering": ("device", "quick", "force", "records"),
    "training_step": ("records",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    present = [name for name in BENCHMARKS if importlib.util.find_spec(f"benchmarks.{name}")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(present)} (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--force", action="store_true", help="measure again what is on record")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--docs", type=Path, default=report.DOCS)
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.names) - set(present)):
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(present)}")
    if args.quick and args.records == RECORDS:
        # Figures of small shapes have no place among the real ones.
        args.records, args.docs = (REPOSITORY / "runs" / "bench-quick" / name for name in ("records", "docs"))
    options = {
        "device": [] if args.device == "cpu" else [f"--device={args.device}"],
        "quick": ["--quick"] if args.quick else [],
        "force": ["--force"] if args.force else [],
        "records": [f"--records={args.records.resolve()}"],
    }
    status = 0
    for name in args.names or present:
        lacking = [option for option in ("quick", "device") if option not in BENCHMARKS[name] and options[option]]
        if lacking:
            print(f"\n# {name}: left out, it has no --{lacking[0]}", flush=True)
            continue
        command = [sys.executable, "-m", f"benchmarks.{name}", *(o for key in BENCHMARKS[name] for o in options[key])]
        print(f"\n# {name}", flush=True)
        status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode or status
    report.main([f"--records={args.records}", f"--docs={args.docs}"])
    return status


if __name__ == "__main__":
    sys.exit(main())
