"""The log of a run: being written, torn, resumed, and of another shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vgs_distill.errors import InputError
from vgs_distill.report.log import LOG_FILE, read_run

from tests.command_line import invoke
from tests.html_page import Page
from tests.report.recorded_run import (
    MODULES,
    STEPS,
    completion,
    html_of,
    logged,
    metrics,
    page_of,
    records_of,
    start,
    write,
)

# ---------------------------------------------------------------------- live, torn and resumed logs


@pytest.mark.parametrize("end", ["", "\n", '\n{"kind": "met', '\n{"kind": "metrics", "step": 31, "time"', "\n\x00\xff"])
def test_a_log_that_is_being_written_can_be_read(run_dir: Path, end: str) -> None:
    write(run_dir, records_of(run_dir)[:33], end)
    log = read_run(run_dir)
    assert max(log.steps) == 30
    assert "Step 30 of 60, training, or killed." in page_of(run_dir).text


def test_a_log_can_be_read_wherever_it_is_cut(run_dir: Path) -> None:
    content = (run_dir / LOG_FILE).read_bytes()
    seen = set()
    for cut in range(0, len(content), 97):
        (run_dir / LOG_FILE).write_bytes(content[:cut])
        if b'"kind": "metrics"' in content[:cut].rpartition(b"\n")[0]:
            seen.add(max(read_run(run_dir).steps))
    assert seen == set(range(1, STEPS + 1))


def test_a_resumed_run_shows_each_step_once(run_dir: Path) -> None:
    changed = {**logged(41), "values": metrics(41) | {"entropy": 7.5}}
    records = [*records_of(run_dir)[:53], completion(50, ["late"], [1.0]), start(40), changed, logged(42)]
    write(run_dir, records)
    log = read_run(run_dir)
    assert list(log.steps) == list(range(1, 43))
    assert log.steps[41]["entropy"] == 7.5
    assert [record["step"] for record in log.completions] == [1]
    assert "in 2 starts" in page_of(run_dir).text


def test_a_run_that_starts_afresh_in_the_same_folder_forgets_the_old_one(run_dir: Path) -> None:
    write(run_dir, [*records_of(run_dir), start(), logged(1), logged(2)])
    log = read_run(run_dir)
    assert list(log.steps) == [1, 2]
    assert log.completions == log.modules == []
    assert len(log.sessions) == 1


# ---------------------------------------------------------------------- the command


def test_the_command_writes_one_file(run_dir: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    result = invoke(["report", str(run_dir)])
    assert result.exit_code == 0, result.output
    assert set(tmp_path.rglob("*")) - before == {run_dir / "report.html"}
    other = tmp_path / "other.html"
    assert invoke(["report", str(run_dir), "--output", str(other)]).exit_code == 0
    assert other.read_text() == (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no directory"),
        ({}, "is not a training run (it has no recording/log.jsonl)"),
        ({LOG_FILE: ""}, "nothing is logged in"),
        ({LOG_FILE: json.dumps(start()) + "\n"}, "nothing is logged in"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path: Path, content: dict[Path, str] | None, sentence: str) -> None:
    folder = tmp_path / "run"
    for name, text in (content or {}).items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    if content is not None:
        folder.mkdir(exist_ok=True)
    result = invoke(["report", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("vgs: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_an_output_that_cannot_be_written_is_one_sentence(run_dir: Path) -> None:
    result = invoke(["report", str(run_dir), "--output", str(run_dir / "none" / "report.html")])
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------- JSON of another shape


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ([1, 2], "its kind is not one of start, metrics, completion, modules, dependency, thirds, end"),
        (7, "its kind is not one of"),
        ({"kind": ["start"]}, "its kind is not one of"),
        ({**logged(2), "kind": "other"}, "its kind is not one of"),
        (without(logged(2), "step"), "it has no 'step'"),
        ({**logged(2), "step": "2"}, "its 'step' is of another shape"),
        ({**logged(2), "step": 2.5}, "its 'step' is of another shape"),
        ({**logged(2), "step": -1}, "its 'step' is of another shape"),
        ({**logged(2), "time": 1e300}, "its 'time' is of another shape"),
        ({**logged(2), "values": {"loss/standard": "low"}}, "its 'values' is of another shape"),
        ({**logged(2), "values": {"loss/standard": float("nan")}}, "its 'values' is of another shape"),
        ({**logged(2), "values": {"loss/standard": 10**400}}, "its 'values' is of another shape"),
        ({**logged(2), "values": [1]}, "its 'values' is of another shape"),
        ({**start(), "settings": {"student": "a"}}, "its 'settings' is of another shape"),
        ({**start(), "max_steps": None}, "its 'max_steps' is of another shape"),
        (completion(2, ["a", "b"], [1.0]), "tokens, log_ratios, dependency differ in length"),
        (completion(2, ["a"], ["b"]), "its 'log_ratios' is of another shape"),  # type: ignore[list-item]
        (completion(2, ["a"], None, images="0123.png"), "its 'images' is of another shape"),
        (completion(2, ["a"], None, prompt=None), "its 'prompt' is of another shape"),
        (completion(2, ["a"], None, teacher=["a"]), "its 'teacher' is of another shape"),
        ({**MODULES, "names": ["a"]}, "names, norms_first, norms_second, cosines differ in length"),
        ({**MODULES, "cosines": None}, "its 'cosines' is of another shape"),
    ],
)
def test_a_record_of_another_shape_is_one_sentence(run_dir: Path, record: Any, fault: str) -> None:
    write(run_dir, [start(), logged(1), record])
    result = invoke(["report", str(run_dir)])
    assert result.exit_code == 2
    assert result.stderr.startswith("vgs: line 3 of ")
    assert fault in result.stderr
    assert result.stderr.endswith("; remove the line\n")
    assert result.stderr.count("\n") == 1


def test_a_line_of_endless_brackets_is_one_sentence(run_dir: Path) -> None:
    write(run_dir, [start(), logged(1)], end="\n" + "[" * 100_000 + "\n")
    result = invoke(["report", str(run_dir)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_a_log_without_a_start_is_one_sentence(run_dir: Path) -> None:
    write(run_dir, [logged(1)])
    result = invoke(["report", str(run_dir)])
    assert result.exit_code == 2
    assert "has no record of a start" in result.stderr


MEASURED = {"accuracy": 0.5, "standard": None}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"with_image": MEASURED, "without_image": MEASURED}, "it has no 'rows'"),
        ({"rows": 1, "with_image": 0.5, "without_image": MEASURED}, "its 'with_image' is of another shape"),
        (
            {"rows": 1, "with_image": MEASURED, "without_image": {"standard": 1}},
            "its 'without_image' is of another shape",
        ),
    ],
)
def test_an_evaluation_of_another_shape_is_one_sentence(run_dir: Path, content: Any, fault: str) -> None:
    (run_dir / "eval.json").write_text(json.dumps(content))
    result = invoke(["report", str(run_dir)])
    assert result.exit_code == 2
    assert "eval.json' is not what vgs eval writes" in result.stderr
    assert fault in result.stderr


@pytest.mark.parametrize("content", ['["no evaluation"]', '{"eval_loss": 1.5}', "{", "[" * 100_000])
def test_files_of_other_programs_are_passed_over(run_dir: Path, content: str) -> None:
    (run_dir / "eval_results.json").write_text(content)
    assert read_run(run_dir).evaluations == []


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_RECORDS = [start(), logged(1), completion(1, ["a"], [1.0]), MODULES, {"kind": "end", "step": 1, "time": 1e9}]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_log_holds_ends_in_a_page_or_a_sentence(run_dir: Path, data: st.DataObject) -> None:
    record = dict(data.draw(st.sampled_from(_RECORDS)))
    record[data.draw(st.sampled_from(sorted(record)))] = data.draw(_VALUES)
    write(run_dir, [start(), logged(1), MODULES, completion(1, ["a"], [1.0]), record])
    try:
        Page(html_of(run_dir))
    except InputError as error:
        sentence = str(error)
    else:
        sentence = ""
    assert "\n" not in sentence
