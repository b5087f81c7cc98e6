"""Help and the check of flags, which read the sources of the dataclasses, against the dataclasses themselves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from trl import DistillationConfig
from vgs_distill import VGSConfig
from vgs_distill.commands.arguments import SettingsParser, _kinds, eval_parser, train_parser
from vgs_distill.commands.fields import _HELP, _OTHER_NAMES, COMMON, fields_of

from tests.command_line import invoke

PARSERS = {"train": train_parser, "eval": eval_parser}
SECTIONS = {
    "train": ["steering (vgs)", "data", "models", "training (transformers)", "distillation and rollouts (TRL)"],
    "eval": ["evaluation (vgs)", "data", "models"],
}


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_sources_say_what_the_dataclasses_are(command: str) -> None:
    parser: SettingsParser = PARSERS[command]()
    declared = {item.name: item for kind in parser.dataclass_types for item in fields(kind) if item.init}
    found = fields_of(command)
    assert found.keys() == declared.keys()
    for name, item in declared.items():
        default = None if item.default in (MISSING, None, "") else item.default
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        if name != "optim":  # transformers computes its default
            assert found[name].default == (None if default is None else shown), name
        if name not in _HELP[command]:
            assert found[name].help == item.metadata["help"].replace("%%", "%"), name
        kinds = _kinds(parser._hints[name]) - {type(None)}
        for kind, shown in ((int, "INT"), (float, "FLOAT"), (bool, "true|false")):
            assert (found[name].kind == shown) == (kinds == {kind}), name


def test_the_help_of_a_setting_of_the_engine_is_its_entry_in_the_docstring() -> None:
    found, inherited = fields_of("train"), {item.name for item in fields(DistillationConfig)}
    assert [item.name for item in fields(VGSConfig) if item.name not in inherited and not found[item.name].help] == []
    assert found["gamma_max"].help == "Bounds of an adaptive gamma; it starts in their middle."
    assert found["image_mask"].summary == "What the masked view of a prompt is: 'drop', 'blank' or 'attention'."
    assert found["image_mask"].help.endswith("'attention': image tokens stay, but nothing attends to them.")


def test_what_is_said_of_fields_is_of_fields_that_exist() -> None:
    every = fields_of("train") | fields_of("eval")
    for command in PARSERS:
        known = fields_of(command)
        assert _HELP[command].keys() <= known.keys()
        common = [name for names in COMMON[command].values() for name in names]
        assert len(set(common)) == len(common)
        assert set(common) <= known.keys()
    assert set(_OTHER_NAMES.values()) <= every.keys()
    assert not _OTHER_NAMES.keys() & fields_of("train").keys()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_shows_what_people_set_and_help_all_the_rest(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    short, full = (invoke([command, flag]).stdout for flag in ("--help", "--help-all"))
    shown = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    common = [f"--{name}" for names in COMMON[command].values() for name in names]
    assert [flag for flag in shown if flag in common] == common
    assert len(common) <= 45
    every = [line.split()[0] for line in full.splitlines() if line.startswith("  --")]
    assert {f"--{name}" for name in fields_of(command)} <= set(every)
    places = [full.index(f"\n{section}:\n") for section in SECTIONS[command]]
    assert places == sorted(places)
    assert max(map(len, (short + full).splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("train", "--lr", "learning_rate"),
        ("train", "--epochs", "num_train_epochs"),
        ("train", "--batch_size", "per_device_train_batch_size"),
        ("train", "--batch-size=4", "per_device_train_batch_size"),
        ("train", "--use_lora", "use_peft"),
        ("train", "-lr", "learning_rate"),
        ("train", "--gama", "gamma"),
        ("train", "--nonsense", None),
        ("eval", "--batchsize", "batch_size"),
        ("eval", "--limit", "max_rows"),
        ("eval", "--lr", None),
    ],
)
def test_a_flag_that_does_not_exist_is_answered_by_what_was_meant(command: str, flag: str, meant: str | None) -> None:
    result = invoke([command, flag, "1"])
    assert result.exit_code == 2
    remedy = f"; did you mean {meant!r}?" if meant else ""
    assert result.stderr == f"vgs: vgs {command} has no flag {flag.partition('=')[0]!r}{remedy}\n"


def test_what_a_command_needs_is_asked_for() -> None:
    assert invoke(["eval"]).stderr == (
        "vgs: model_name_or_path and dataset_name must be given, in the YAML file or as a flag\n"
    )
    assert (
        "vgs: output_dir, teacher_model_name_or_path and dataset_name must"
        in invoke(["train", "--model_name_or_path", "x"]).stderr
    )


def test_a_file_without_its_flag_is_named() -> None:
    result = invoke(["train", "run.yaml"])
    assert result.stderr == (
        "vgs: vgs train takes flags only, but got 'run.yaml'; a settings file is given with --config\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["train", "--help-all"],
        ["eval", "--lr", "1"],
        ["eval"],
        ["train", "--config", "wrong.yaml"],
    ],
)
def test_the_answer_comes_before_the_heavy_imports(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("gama: 0.8\n")
    arguments = [str(tmp_path / name) if name == "wrong.yaml" else name for name in arguments]
    command = (
        "import sys; from vgs_distill.commands.cli import run\n"
        f"try: run({arguments!r})\n"
        "finally: print({'torch', 'transformers', 'trl', 'rich'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "set()"
