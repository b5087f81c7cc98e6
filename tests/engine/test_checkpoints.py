"""What a checkpoint holds, what happens when it cannot be written, and what is refused on resume."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint
from vgs_distill import VGSTrainer
from vgs_distill.errors import TrainingStopped
from vgs_distill.resilience.checkpoints import STAGING, STATE_FILE, check_space, last_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Writes past the limit fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def parameters(trainer: VGSTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


# The weights take 0.4 MB and the optimizer's state 0.9 MB.
@pytest.mark.parametrize("limit", [300_000, 600_000])
def test_a_failed_write_leaves_the_last_checkpoint_whole(
    make_trainer: Callable[..., VGSTrainer], file_size_limit: Callable[[int], None], limit: int, tmp_path: Path
) -> None:
    make_trainer(**SAVING, max_steps=1).train()
    trainer = make_trainer(**SAVING, save_total_limit=1)
    file_size_limit(limit)
    with pytest.raises(TrainingStopped, match=r"cannot write checkpoint-2 into .*; make room .*checkpoint-1' is whole"):
        trainer.train(resume_from_checkpoint=True)
    file_size_limit(resource.RLIM_INFINITY)
    assert sorted(path.name for path in (tmp_path / "run").glob("*check*")) == ["checkpoint-1"]
    assert not (tmp_path / "run" / STAGING).exists()
    make_trainer(**SAVING).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_a_directory_that_went_away_is_named(make_trainer: Callable[..., VGSTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(**SAVING)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").write_text("a file now")
    with pytest.raises(
        TrainingStopped, match=r"cannot write checkpoint-1 into .*run'.*no checkpoint was written before"
    ):
        trainer.train()


def test_space_is_asked_for_before_writing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, free // 2)
    with pytest.raises(OSError, match=r"MiB are needed and .* MiB free"):
        check_space(tmp_path, 2 * free)


def test_old_checkpoints_go_and_what_stays_is_safetensors_and_json(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Path
) -> None:
    make_trainer(**SAVING, max_steps=3, save_total_limit=2, eta="amortized").train()
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("*check*")) == ["checkpoint-2", "checkpoint-3"]
    assert get_last_checkpoint(str(run)) == str(last_checkpoint(run)) == str(run / "checkpoint-3")
    assert (run / "checkpoint-3" / "model.safetensors").exists()
    state = json.loads((run / "checkpoint-3" / STATE_FILE).read_text())
    assert state["state"]["steering"]["average"]
    transformers_own = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert {
        name for name in state["files"] if not name.endswith((".json", ".safetensors", ".jinja"))
    } == transformers_own


def test_the_best_checkpoint_is_known_by_its_name(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, tmp_path: Path
) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(eval_dataset=prompts.select(range(4)), per_device_eval_batch_size=4, **SAVING, **evaluating)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in [str(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2)]
    recorded = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert recorded["best_model_checkpoint"] == best


def test_a_checkpoint_of_an_earlier_run_is_replaced(make_trainer: Callable[..., VGSTrainer], tmp_path: Path) -> None:
    make_trainer(**SAVING, max_steps=1).train()
    before = (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_bytes()
    make_trainer(**SAVING, max_steps=1, seed=12).train()
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_bytes() != before
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


def test_a_stream_resumes_in_its_second_epoch(
    make_trainer: Callable[..., VGSTrainer], prompts: Dataset, tmp_path: Path
) -> None:
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}  # 3 steps an epoch
    straight = make_trainer(prompts.to_iterable_dataset(), **SAVING, **settings)
    straight.train()
    resumed = make_trainer(prompts.to_iterable_dataset(), **settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(resumed), strict=True))


def test_a_folder_that_lost_a_file_is_passed_over_and_refused(
    make_trainer: Callable[..., VGSTrainer], tmp_path: Path
) -> None:
    make_trainer(**SAVING).train()
    run = tmp_path / "run"
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert last_checkpoint(run) == run / "checkpoint-1"
    with pytest.raises(ValueError, match=r"optimizer.pt is missing; resume from '.*checkpoint-1'"):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-2"))
    with (run / "checkpoint-1" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes instead of \d+; start from the beginning"):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"no whole checkpoint in .* leave out resume_from_checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=f"run' is not a whole checkpoint of this trainer: it has no {STATE_FILE}"):
        make_trainer().train(resume_from_checkpoint=str(run))
    with pytest.raises(ValueError, match="nowhere' is not a folder; give one such as"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_checkpoint_without_an_optimizer_is_refused(make_trainer: Callable[..., VGSTrainer]) -> None:
    make_trainer(**SAVING, save_only_model=True).train()
    with pytest.raises(ValueError, match="holds the model only"):
        make_trainer().train(resume_from_checkpoint=True)


def test_another_loss_is_refused_and_other_settings_are_named(
    make_trainer: Callable[..., VGSTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(**SAVING, max_steps=1).train()
    with pytest.raises(ValueError, match=r"trained with method='vgs', but method is 'matched'; set it"):
        make_trainer(method="matched").train(resume_from_checkpoint=True)
    make_trainer(gamma=0.7).train(resume_from_checkpoint=True)
    assert "(gamma 2.0 -> 0.7)" in caplog.text
