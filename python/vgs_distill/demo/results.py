"""`results.json`: what the demo measured, in one plain dictionary.

Schema (version 2); accuracies are in 0..1, times in seconds:

    schema          2
    status          "complete", or "incomplete" with `error`, one sentence
    task            "digits", "shapes" or "easyvqa"
    quick           whether the short variant ran
    seeds           list of seeds
    recipe          every number of the demo (`recipes.DemoRecipe`), nested
    methods         per name of a run's method: label, method (of `VGSConfig`), gamma, eta (null: the method's own),
                    settings, note, as_long_as (the method whose time it takes, or null)
    versions        per distribution name, and "python"
    machine         platform, processor count, worker processes
    teacher         with_image, without_image (accuracies), by_question_type, well_formed, cached
    student_start   accuracy (a spread), by_question_type, per_seed {seed: accuracy}
    summary         per name of a run's method:
                      accuracy           a spread over seeds
                      without_image      a spread
                      by_question_type   question type -> mean over seeds
                      against_prior      mean over seeds
                      well_formed        mean over seeds
                      steps              mean over seeds
                      gain_over_opd      a spread of paired differences over seeds; absent for the baseline
                      cosine             mean of gradient/cosine over the steps that measured it, and seeds; absent for
                                         what is not steered, null where eta is a number
                      absolute_cosine    mean of its absolute value; absent for what is not steered
                      step_seconds       mean of a step's four measured parts, and their sum as "total"
    runs            list of {name, seed, method, accuracy, by_question_type, against_prior, well_formed,
                    without_image, folder (relative to the results file), seconds}
    gallery         list of {index, question, answer, question_type, against_prior, answers: {who: {completion,
                    answer, correct}}}; `index` counts into the balanced test set
    seconds         total wall time, per job

A spread is {mean, deviation (sample standard deviation; null for one seed), values (in the order of the seeds)}.
Histories are not in here: each run's folder holds `history.json`, one row per step with the engine's own keys.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vgs_distill.demo.methods import OPD, Method
from vgs_distill.demo.recipes import DemoRecipe
from vgs_distill.demo.worlds import Example

SCHEMA = 2
GALLERY_SIZE = 12
_DISTRIBUTIONS = ("vgs-kernels", "torch", "transformers", "trl", "accelerate", "tokenizers", "numpy")
_TIME_PARTS = ("rollout", "teacher", "student", "steering", "masked_teacher", "masked_student")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def summarize(
    *,
    recipe: DemoRecipe,
    quick: bool,
    seeds: Sequence[int],
    methods: Sequence[Method],
    workers: int,
    teacher: dict[str, Any] | None,
    starts: dict[int, dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    folder: Path,
    total_seconds: float,
    error: str | None,
) -> dict[str, Any]:
    """Build the results dictionary from whatever has finished; see the module's page for its shape."""
    finished_seeds = [seed for seed in seeds if seed in starts]
    return {
        "schema": SCHEMA,
        "status": "complete" if error is None else "incomplete",
        **({} if error is None else {"error": error}),
        "task": recipe.task,
        "quick": quick,
        "seeds": list(seeds),
        "recipe": asdict(recipe),
        "methods": {method.name: asdict(method) for method in methods},
        "versions": installed_versions(),
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "workers": workers,
        },
        "teacher": _teacher_record(teacher),
        "student_start": _start_record([starts[seed] for seed in finished_seeds]),
        "summary": {
            method.name: _method_summary(method, seeds, runs)
            for method in methods
            if any(run["method"] == method.name for run in runs)
        },
        "runs": [_run_record(run, folder) for run in runs],
        "gallery": gallery(examples, teacher, starts, runs, seeds, methods),
        "seconds": {
            "total": total_seconds,
            "teacher": teacher["seconds"] if teacher else None,
            "student_start": {str(seed): starts[seed]["seconds"] for seed in finished_seeds},
        },
    }


def installed_versions() -> dict[str, str]:
    """Versions that a reader needs to repeat the run."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def gallery(
    examples: Sequence[Example],
    teacher: dict[str, Any] | None,
    starts: dict[int, dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    methods: Sequence[Method],
) -> list[dict[str, Any]]:
    """Examples spread over the balanced test set with every model's answer, of the first seed that has finished.

    Not picked by outcome: evenly spaced, whoever got them right, with each question type in turn.
    """
    types = len({example.question_type for example in examples})
    spacing = max(1, len(examples) // GALLERY_SIZE)
    while math.gcd(spacing, types) > 1:  # the types take turns: a common factor would show some types only
        spacing -= 1
    first = next((seed for seed in seeds if seed in starts), None)
    written: dict[str, Any] = {}
    if teacher is not None:
        written["teacher"] = teacher["with_image"]["judgements"]
    if first is not None:
        written["start"] = starts[first]["evaluation"]["judgements"]
    for method in methods:
        for run in runs:
            if run["method"] == method.name and run["seed"] == first:
                written[method.name] = run["evaluation"]["judgements"]
    return [
        {
            "index": index,
            "question": example.question,
            "answer": example.answer,
            "question_type": example.question_type,
            "against_prior": example.against_prior,
            "answers": {who: dict(judgements[index]) for who, judgements in written.items()},
        }
        for index, example in list(enumerate(examples))[::spacing][:GALLERY_SIZE]
    ]


def _mean(values: Iterable[float]) -> float | None:
    """Mean of the finite values, None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _mean_by_type(evaluations: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        kind: statistics.fmean(evaluation["by_question_type"][kind] for evaluation in evaluations)
        for kind in evaluations[0]["by_question_type"]
    }


def _teacher_record(teacher: dict[str, Any] | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    return {
        "with_image": teacher["with_image"]["accuracy"],
        "without_image": teacher["without_image"]["accuracy"],
        "by_question_type": teacher["with_image"]["by_question_type"],
        "well_formed": teacher["with_image"]["well_formed"],
        "cached": teacher["cached"],
    }


def _start_record(starts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not starts:
        return None
    evaluations = [start["evaluation"] for start in starts]
    return {
        "accuracy": spread([evaluation["accuracy"] for evaluation in evaluations]),
        "by_question_type": _mean_by_type(evaluations),
        "well_formed": statistics.fmean(evaluation["well_formed"] for evaluation in evaluations),
        "per_seed": {str(start["seed"]): start["evaluation"]["accuracy"] for start in starts},
    }


def _method_summary(method: Method, seeds: Sequence[int], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = {run["seed"]: run for run in runs if run["method"] == method.name}
    baseline = {run["seed"]: run for run in runs if run["method"] == OPD.name}
    ordered = [own[seed] for seed in seeds if seed in own]
    evaluations = [run["evaluation"] for run in ordered]
    rows = [row for run in ordered for row in run["history"]]
    summary: dict[str, Any] = {
        "accuracy": spread([evaluation["accuracy"] for evaluation in evaluations]),
        "without_image": spread([run["without_image"]["accuracy"] for run in ordered]),
        "by_question_type": _mean_by_type(evaluations),
        "against_prior": statistics.fmean(evaluation["against_prior"] for evaluation in evaluations),
        "well_formed": statistics.fmean(evaluation["well_formed"] for evaluation in evaluations),
        "steps": len(rows) / len(ordered),
        "step_seconds": _step_seconds(rows, ordered),
    }
    pairs = [seed for seed in seeds if seed in own and seed in baseline]
    if method != OPD and pairs:
        summary["gain_over_opd"] = spread(
            [own[seed]["evaluation"]["accuracy"] - baseline[seed]["evaluation"]["accuracy"] for seed in pairs]
        )
    if method.steered:
        cosines = [row["gradient/cosine"] for row in rows if "gradient/cosine" in row]
        summary["cosine"] = _mean(cosines)
        summary["absolute_cosine"] = _mean(map(abs, cosines))
        directions = [row["steering/direction_cosine"] for row in rows if "steering/direction_cosine" in row]
        if directions:
            summary["direction_cosine"] = {"mean": _mean(directions), "worst": min(directions)}
    return summary


def _step_seconds(rows: Sequence[dict[str, float]], runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    parts = {}
    for part in _TIME_PARTS:
        mean = _mean(row[f"time/{part}"] for row in rows if f"time/{part}" in row)
        if mean is not None:
            parts[part] = mean
    # Whole training time over steps: holds the optimizer and the data loading, which no part claims.
    parts["total"] = sum(run["seconds"]["training"] for run in runs) / max(1, len(rows))
    return parts


def _run_record(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    evaluation = run["evaluation"]
    return {
        "name": Path(run["folder"]).name,
        "seed": run["seed"],
        "method": run["method"],
        "accuracy": evaluation["accuracy"],
        "by_question_type": evaluation["by_question_type"],
        "against_prior": evaluation["against_prior"],
        "well_formed": evaluation["well_formed"],
        "without_image": run["without_image"]["accuracy"],
        "folder": Path(run["folder"]).relative_to(folder).as_posix(),
        "seconds": run["seconds"],
    }
