"""The records of judged runs, found by what they are, and the numbers that are read off one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vgs_distill.diagnosis.measure import Diagnosis, from_plain

from benchmarks.study.plan import ARMS, HALF_WARM, TASKS, learning_rate
from benchmarks.study.statistics import Estimate, estimate

Record = Mapping[str, Any]
Reading = Callable[[Record], float | None]

ENDS = 10  # steps at either end of a run whose mean is its start or its end
DOUBLED = 2.0  # times its start: the language loss of a run that unlearns, see `doubling`


class Study:
    """Runs on the test split at their tuned learning rate, by task, regime and arm."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = records
        self._runs: dict[tuple[str, str, str], dict[int, Record]] = {}
        for record in records.values():
            run = record["run"]
            rate = learning_rate(records, run["task"], run["regime"], run["arm"])
            if run["split"] == "test" and run["learning_rate"] == rate:
                self._runs.setdefault((run["task"], run["regime"], run["arm"]), {})[run["seed"]] = record

    def runs(self, task: str, arm: str, regime: str = HALF_WARM) -> dict[int, Record]:
        """By seed."""
        return self._runs.get((task, regime, arm), {})

    def all(self, chosen: Callable[[str], bool]) -> Iterator[tuple[str, str, str, int, Record]]:
        """Task, regime, arm, seed and record of every run of the arms that are `chosen`."""
        for (task, regime, arm), runs in sorted(self._runs.items()):
            if chosen(arm):
                for seed, record in sorted(runs.items()):
                    yield task, regime, arm, seed, record

    def values(self, read: Reading, task: str, arm: str, regime: str = HALF_WARM) -> list[float]:
        found = (read(record) for _, record in sorted(self.runs(task, arm, regime).items()))
        return [value for value in found if value is not None]

    def starts(self, task: str, regime: str) -> list[tuple[Record, Diagnosis]]:
        """Of those starts that have been measured, not only judged."""
        found = self.runs(task, "start", regime)
        return [(r, from_plain(r["diagnosis"])) for _, r in sorted(found.items()) if r.get("diagnosis")]

    def gain(
        self, task: str | None, arm: str, over: str = "opd", regime: str = HALF_WARM, read: Reading | None = None
    ) -> Estimate | None:
        """What is read (accuracy, in points) of `arm` less that of `over`, paired by seed; of all tasks for None."""
        read = read or accuracy
        differences = []
        for each in TASKS if task is None else [task]:
            own, other = self.runs(each, arm, regime), self.runs(each, over, regime)
            for seed in sorted(own.keys() & other.keys()):
                first, second = read(own[seed]), read(other[seed])
                if first is not None and second is not None:
                    differences.append(first - second)
        return estimate(differences) if differences else None


def accuracy(record: Record) -> float:
    return 100 * float(record["accuracy"])


def against_prior(record: Record) -> float:
    """Of the questions that guessing gets wrong: only looking helps."""
    return 100 * float(record["against_prior"])


def with_prior(record: Record) -> float | None:
    """Of the questions that guessing gets right."""
    return 100 * float(record["with_prior"]) if "with_prior" in record else None


def collapsed(record: Record) -> bool:
    """Worse than guessing fluently: fewer than nine in ten completions have the form of an answer."""
    return float(record["well_formed"]) < 0.9


def series(record: Record, name: str) -> list[float]:
    return [value for value in record.get("series", {}).get(name, []) if value is not None]


def mean_cosine(record: Record) -> float | None:
    values = series(record, "cosine")
    return statistics.fmean(values) if values else None


def language_growth(record: Record) -> float | None:
    """Natural logarithm of the language loss at the end over that at the start."""
    values = series(record, "lang")
    if len(values) < 2 * ENDS:
        return None
    return math.log(statistics.fmean(values[-ENDS:]) / max(1e-4, statistics.fmean(values[:ENDS])))


def unlearned(record: Record) -> bool:
    """Whether the language loss ends above where it started."""
    growth = language_growth(record)
    return growth is not None and growth > 0


def doubling(record: Record) -> int | None:
    """The step, from 1, from which the language loss, averaged over 10 steps, stays at twice its start or above for 20
    steps or to the end; None where it never does. In hindsight: what monitors are judged by."""
    values = series(record, "lang")
    start = statistics.fmean(values[:ENDS]) if values else 0.0
    means = [statistics.fmean(values[max(0, at - ENDS) : at]) for at in range(1, len(values) + 1)]
    above = [mean >= DOUBLED * max(start, 0.01) for mean in means]
    for at, high in enumerate(above):
        if high and all(above[at : at + 2 * ENDS]):
            return at + 1
    return None


def eta_spread(record: Record) -> float | None:
    """The ninetieth percentile of η over its tenth, of one run."""
    values = series(record, "eta")
    if len(values) < ENDS:
        return None
    deciles = statistics.quantiles(values, n=10)
    return deciles[-1] / deciles[0]


def mean_of(records: Sequence[Record], read: Reading) -> float | None:
    values = [value for record in records if (value := read(record)) is not None]
    return statistics.fmean(values) if values else None


def steered(arm: str) -> bool:
    return ARMS[arm].steered
