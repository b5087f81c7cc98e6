"""ms-swift 4.6 by `vgs_distill.integrations.swift`: its own first loss, one Gramian for two processes, adapters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.environment import ROOT, run

PACKAGES = ["ms-swift==4.6.*", "qwen_vl_utils", "decord", "msgspec"]
FLAGS = (
    "--lmbda=1.0", "--beta=1.0", "--temperature=1.0", "--max_completion_length=6", "--max_length=512", "--max_steps=3",
    "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2", "--logging_steps=1", "--learning_rate=1e-3",
    "--torch_dtype=float32", "--attn_impl=sdpa", "--report_to=none", "--save_strategy=no", "--eval_strategy=no",
    "--split_dataset_ratio=0", "--dataset_num_proc=1", "--dataloader_num_workers=0", "--freeze_vit=false",
    "--tuner_type",
)  # fmt: skip
PLUGIN = """
import json, os, torch
from vgs_distill import MethodSettings
from vgs_distill.integrations.method_step import MethodStep
from vgs_distill.integrations.swift import register
register(MethodSettings(**json.loads(os.environ["VGS_TEST_SETTINGS"])))
own = MethodStep.finish
def finish(self, student):
    values = own(self, student)
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    row = torch.tensor([*(values[name] for name in sorted(values)), float(norm)], dtype=torch.float64)
    rows = [torch.zeros_like(row) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, row)
    print("AGREE", len(rows), all(torch.equal(rows[0], other) for other in rows), flush=True)
    return values
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    MethodStep.finish = finish
"""


@pytest.fixture(scope="module")
def swift(
    engine: Callable[[str, list[str]], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[list[float], str]]:
    python = engine("swift", PACKAGES)
    models = tmp_path_factory.mktemp("swift")
    run(python, str(ROOT / "tests/integrations/tiny_models.py"), str(models))
    plugin = models / "plugin.py"
    plugin.write_text(PLUGIN)

    def train(kind: str, settings: str | None, *flags: str, **variables: str) -> tuple[list[float], str]:
        """The losses of three steps, and all that was printed."""
        student, teacher = (str(models / f"{kind}-{role}") for role in ("student", "teacher"))
        output = run(
            python, str(python.with_name("swift")), "rlhf", "--rlhf_type", "gkd",
            "--model", student, "--model_type", kind, "--template", kind,
            "--teacher_model", teacher, "--teacher_model_type", kind, "--dataset", str(models / "rows.jsonl"),
            *FLAGS, *(flags or ("full",)), "--output_dir", str(models / "out"),
            *([] if settings is None else ["--external_plugins", str(plugin)]),
            VGS_TEST_SETTINGS=settings or "", **variables,
        )  # fmt: skip
        return [float(loss) for loss in re.findall(r"'loss': '([\d.e-]+)'", output)], output

    return train


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_the_first_loss_is_swift_s_and_opd_is_swift_s_run(kind: str, swift: Callable[..., tuple]) -> None:
    theirs, _ = swift(kind, None)
    assert len(theirs) == 3
    opd, _ = swift(kind, '{"method": "opd"}')
    assert opd == pytest.approx(theirs, abs=1e-4)
    steered, output = swift(kind, '{"method": "vgs", "eta": "measured"}')
    assert steered[0] == pytest.approx(theirs[0], abs=1e-4)
    assert steered[1:] != theirs[1:]
    assert len(re.findall(r"'gradient/cosine'", output)) == 3
    assert set(re.findall(r"'vgs/skipped': '([^']+)'", output)) == {"0"}


@pytest.mark.parametrize("flags", [(), ("lora",)])
def test_two_processes_agree(flags: tuple[str, ...], swift: Callable[..., tuple]) -> None:
    two = {"NPROC_PER_NODE": "2"}
    cpu = ("--use_cpu", "true", "--ddp_backend", "gloo")
    theirs, _ = swift("qwen3_vl", None, *(flags or ("full",)), *cpu, **two)
    losses, output = swift("qwen3_vl", '{"method": "vgs_unit"}', *(flags or ("full",)), *cpu, **two)
    assert losses[0] == pytest.approx(theirs[0], abs=1e-4)
    assert set(re.findall(r"AGREE (\d) (\w+)", output)) == {("2", "True")}


@pytest.mark.parametrize("method", ["matched", "teacher_prior", "language"])
def test_every_method_trains_an_adapter(method: str, swift: Callable[..., tuple]) -> None:
    losses, output = swift("qwen3_vl", f'{{"method": "{method}"}}', "lora")
    assert len(losses) == 3
    assert set(re.findall(r"'vgs/skipped': '([^']+)'", output)) == {"0"}
