"""Small worlds, models and results that the demo's tests share. Everything is seeded and runs on one thread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from vgs_distill.demo.methods import methods_for
from vgs_distill.demo.models import build_model, build_processor
from vgs_distill.demo.recipes import ModelSize, demo_recipe
from vgs_distill.demo.worlds import make_world, world_names


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=world_names())
def world(request):
    return make_world(request.param)


@pytest.fixture(scope="session")
def digits():
    return make_world("digits")


@pytest.fixture(scope="session")
def processor(digits):
    return build_processor(digits.words)


@pytest.fixture(scope="session")
def tiny_size():
    return ModelSize(text_width=32, text_layers=1, vision_width=32, vision_layers=1, heads=2)


@pytest.fixture
def untrained(processor, tiny_size):
    torch.manual_seed(0)
    return build_model(tiny_size, processor).eval()


def judgement(completion: str, answer: str | None, correct: bool) -> dict[str, Any]:
    return {"completion": completion, "answer": answer, "correct": correct}


def evaluation(accuracy: float, completion: str = "answer : one") -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "by_question_type": {"where": accuracy, "count": accuracy},
        "against_prior": accuracy,
        "well_formed": 1.0,
        "judgements": [judgement(completion, "one", True), judgement("no idea", None, False)] * 120,
    }


@pytest.fixture
def finished(tmp_path):
    """What workers report for two seeds and three methods, as `summarize` takes it."""
    methods = methods_for(["vgs"], None)
    longer = "opd-as-long-as-vgs"
    accuracy = {
        (0, "opd"): 0.6,
        (1, "opd"): 0.7,
        (0, "vgs"): 0.65,
        (1, "vgs"): 0.73,
        (0, longer): 0.62,
        (1, longer): 0.7,
    }
    runs = []
    for (seed, method), value in accuracy.items():
        history = []
        for step in range(1, 41 if method == longer else 31):
            row = {"step": step, "loss": 1 / step, "loss/standard": 1 / step, "time/rollout": 0.1}
            if method == "vgs":
                row |= {
                    "loss/lang": 0.1,
                    "loss/vis": 1 / step,
                    "gradient/cosine": 0.3 if step % 2 else -0.1,
                    "gradient/norm_standard": 0.5,
                    "gradient/norm_vis": 2.0 / step,
                    "steering/weight_ratio": float(step),
                    "time/steering": 0.02,
                }
            history.append(row)
        runs.append(
            {
                "folder": str(tmp_path / f"seed{seed}-{method}"),
                "seed": seed,
                "method": method,
                "evaluation": evaluation(value, "<script>alert('x')</script> answer : one"),
                "without_image": evaluation(0.2),
                "history": history,
                "seconds": {"training": 6.0, "evaluation": 1.0},
            }
        )
    seconds = {"training": 1.0, "evaluation": 1.0}
    return {
        "recipe": demo_recipe("digits", quick=True),
        "quick": True,
        "seeds": (0, 1),
        "methods": methods,
        "workers": 2,
        "teacher": {
            "with_image": evaluation(0.98),
            "without_image": evaluation(0.15),
            "cached": True,
            "seconds": seconds,
        },
        "starts": {seed: {"seed": seed, "evaluation": evaluation(0.3), "seconds": seconds} for seed in (0, 1)},
        "runs": runs,
        "examples": make_world("digits").balanced("test", 16, 0),
        "folder": tmp_path,
        "total_seconds": 30.0,
        "error": None,
    }


@pytest.fixture
def pictures():
    return [Image.new("RGB", (32, 32), (index, 0, 0)) for index in range(12)]
