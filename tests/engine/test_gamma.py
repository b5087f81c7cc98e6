"""gamma over a run: schedules; and gamma that follows the progress of the two parts: its rule, bounds and state."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from vgs_distill import VGSConfig, VGSTrainer
from vgs_distill.steering.gamma import AdaptiveGamma
from vgs_distill.steering.step import SteeringSettings, SteeringStep

ETAS = [{"eta": "measured"}, {"eta": "amortized", "refresh_every": 3}]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.9, 0.9, 0.9, 0.9, 0.9]),
        ("linear", [0.5, 0.6, 0.7, 0.8, 0.9]),
        ("cosine", [0.5, 0.5585786, 0.7, 0.8414214, 0.9]),
    ],
)
def test_schedules(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    config = VGSConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        method="matched",
        gamma=0.9,
        gamma_start=0.5,
        gamma_schedule=schedule,
    )
    gamma = SteeringStep(config.select(SteeringSettings), torch.device("cpu")).gamma
    assert [gamma.at(step, 5) for step in range(5)] == pytest.approx(expected)
    assert gamma.at(0, 1) == 0.9
    assert gamma.at(7, 5) == pytest.approx(0.9)


def gammas(losses: Iterable[tuple[float, float]], lowest: float = 0.5, highest: float = 0.9) -> list[float]:
    """gamma after every step of (lang, vis)."""
    controller = AdaptiveGamma(lowest, highest)
    found = []
    for lang, vis in losses:
        controller.observe(lang, vis)
        found.append(controller.gamma)
    return found


def test_it_stays_in_the_middle_while_both_make_the_same_progress() -> None:
    left = [0.98**step for step in range(200)]
    assert gammas((0.25 * share, 2.0 * share) for share in left) == pytest.approx([0.7] * 200, abs=1e-12)


def test_the_part_that_lags_gets_more() -> None:
    falling = [0.95**step for step in range(200)]
    towards_vision = gammas((share, 1.0) for share in falling)
    towards_language = gammas((1.0, share) for share in falling)
    assert towards_vision == sorted(towards_vision)
    assert towards_language == sorted(towards_language, reverse=True)
    assert towards_vision[-1] > 0.89
    assert towards_language[-1] < 0.51


def test_what_is_left_of_the_losses_sets_the_share() -> None:
    steps = [(2.0, 8.0)] * 10 + [(0.5, 6.0)] * 400  # a quarter and three quarters are left
    assert gammas(steps)[-1] == pytest.approx(0.5 + 0.4 * 0.75, abs=1e-6)
    assert gammas(steps, 0.2, 0.4)[-1] == pytest.approx(0.2 + 0.2 * 0.75, abs=1e-6)


def test_it_is_bounded_and_moves_slowly_whatever_comes() -> None:
    draw = random.Random(0)
    losses = [(draw.uniform(-1, 5) ** 3, draw.uniform(-5, 5) ** 3) for _ in range(500)]
    found = gammas([*losses, *[(0.0, 0.0)] * 100, *[(-1.0, -1.0)] * 100, *[(1e9, 1e-9)] * 50])
    assert min(found) >= 0.5
    assert max(found) <= 0.9
    assert max(abs(after - before) for before, after in itertools.pairwise(found)) <= 0.01 + 1e-12


def test_the_state_survives_json_to_the_bit() -> None:
    draw = random.Random(1)
    losses = [(draw.random(), draw.random()) for _ in range(60)]
    for cut in (0, 4, 10, 37):
        first, second = AdaptiveGamma(0.5, 0.9), AdaptiveGamma(0.5, 0.9)
        for step in losses[:cut]:
            first.observe(*step)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step in losses[cut:]:
            second.observe(*step)
        assert second.gamma == gammas(losses)[-1]


def logged(trainer: VGSTrainer) -> list[float]:
    return [row["steering/gamma"] for row in trainer.state.log_history if "steering/gamma" in row]


@pytest.mark.parametrize("eta", ETAS)
def test_a_run_follows_its_own_losses(make_trainer: Callable[..., VGSTrainer], eta: dict[str, Any]) -> None:
    trainer = make_trainer(method="vgs_unit", gamma="adaptive", max_steps=14, gradient_accumulation_steps=2, **eta)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss/lang" in row]
    expected = gammas((row["loss/lang"], row["loss/vis"]) for row in rows)
    assert logged(trainer) == [0.7, *expected[:-1]]
    assert len(set(logged(trainer))) > 2
    if "refresh_every" not in eta:
        last = rows[-1]
        share = last["steering/gamma"] / (1 - last["steering/gamma"])
        ratio = share * last["gradient/norm_lang"] / last["gradient/norm_vis"]
        assert last["steering/weight_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_a_resumed_run_has_the_gamma_it_would_have(make_trainer: Callable[..., VGSTrainer], tmp_path: Path) -> None:
    straight = make_trainer(method="vgs_unit", gamma="adaptive", max_steps=14, save_strategy="steps", save_steps=12)
    straight.train()
    resumed = make_trainer(method="vgs_unit", gamma="adaptive", max_steps=14)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    assert logged(resumed) == logged(straight)
    parameters = dict(straight.model.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in resumed.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gamma": "high"}, "gamma must be a number of at least 0 or 'adaptive', got 'high'"),
        ({"gamma_min": 0.9}, r"gamma_min must be below gamma_max, both in \[0, 1\], got 0.9 and 0.9"),
        ({"gamma_max": 1.5}, r"gamma_min must be below gamma_max, both in \[0, 1\], got 0.5 and 1.5"),
        ({"gamma_schedule": "cosine"}, "gamma_schedule is 'cosine'; leave it at 'constant'"),
        ({"method": "teacher_prior"}, "do not allow; use 'matched' or 'vgs_unit', or a number"),
        ({"method": "vgs"}, "method='vgs' do not allow"),
        ({"gamma": 1.2}, r"gamma is a share in \[0, 1\] with method='vgs_unit' or 'adaptive', got 1.2"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VGSConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            **{"method": "vgs_unit", "gamma": "adaptive", **settings},
        )


@pytest.mark.parametrize("written", ["adaptive", "0.6"])
def test_file_and_flag_take_a_number_or_the_word(tmp_path: Path, written: str) -> None:
    from vgs_distill.commands.arguments import train_parser

    file = tmp_path / "run.yaml"
    file.write_text(f"gamma: {written}\n")
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--method", "vgs_unit"]
    for arguments in (["--config", str(file)], ["--gamma", written]):
        (config, *_), values = train_parser().parse([*common, *arguments])
        expected = written if written == "adaptive" else 0.6
        assert config.gamma == values["gamma"] == expected
