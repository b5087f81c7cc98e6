"""The benchmark of a training step: what it counts, on what, and all variants once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import report, training_step
from benchmarks.harness.memory import SavedForBackward


def test_what_is_saved_for_backward_is_counted_once_and_until_its_graph_is_gone() -> None:
    x, weight = torch.ones(1000, requires_grad=True), torch.ones(1000, requires_grad=True)
    size = 4 * 1000
    with SavedForBackward([weight]) as saved:
        y = (x * weight).exp()  # keeps x for weight, weight not counted, and its own result
        z = y * y  # keeps y, which is there already
        assert saved.peak == 2 * size
        z.sum().backward()
        del y, z
        (x * 2.0).exp().sum().backward()  # of a graph after the first one: 1 tensor
    assert saved.peak == 2 * size
    assert torch.equal(x.grad, torch.full_like(x, 2 * math.exp(2) + 2 * math.exp(2)))


def test_views_that_run_back_one_after_the_other_keep_the_longer_one() -> None:
    x = torch.ones(1000, requires_grad=True)
    with SavedForBackward([]) as apart:
        x.exp().sum().backward()
        x[:10].exp().sum().backward()
    with SavedForBackward([]) as together:
        (x.exp().sum() + x[:10].exp().sum()).backward()
    assert apart.peak == 4 * 1000
    assert together.peak == 4 * 1010


@pytest.mark.parametrize(("name", "tokens"), [("demo", 4), ("100m", 256)])
def test_the_training_step_has_as_many_image_tokens_as_it_says(name: str, tokens: int) -> None:
    bench = training_step.Bench(training_step.SCALES[name])
    size = bench.processor.image_processor.merge_size
    image = bench.prompts[0]["image"]
    grid = bench.processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
    assert int(grid.prod()) // size**2 == tokens
    assert (training_step.SCALES[name].pixels // 16) ** 2 == tokens


def test_a_training_step_is_measured_of_every_variant() -> None:
    scale = replace(training_step.SCALES["demo"], batch_size=4, completion=4, steps=1)
    record = training_step.measure("demo", scale, turns=1, refresh_every=4)
    assert record.gate.passed, record.gate.describe()
    assert {row.name for row in record.rows} == set(training_step.VARIANTS)
    assert {target.limit for target in record.targets} == {1.05, 1.15, 1.25}
    parts = record.facts["seconds_by_part"]
    assert {"rollout", "teacher", "student", "steering"} == set(parts["opd"])
    assert all(seconds["masked_teacher"] > 0 for name, seconds in parts.items() if name != "opd")
    saved = record.facts["saved_for_backward"]
    assert saved["vgs, λ 0, constant"] > saved["opd"] / 2
    page = report.build([record], None)
    assert "masked student" in page
    assert "an image has 4 tokens" in page
