"""TRL's own trainers with `patch_trl`: the loss and the update that they have without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

import vgs_kernels.integrations
from tests.conftest import Workspace
from tests.small_run import ON_CPU
from vgs_kernels import patch_trl

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def of_distillation(workspace: Workspace, folder: Path, beta: float) -> Any:
    from vgs_distill import load_rows

    rows = load_rows(str(workspace.root / "rows.parquet"), split="train").select_columns(["prompt", "image"])
    settings: dict[str, Any] = {
        **ON_CPU, "max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 5, "beta": beta, "seed": 1,
        "temperature": 0.9, "learning_rate": 1e-3,
    }  # fmt: skip
    return DistillationTrainer(
        model=str(workspace.root / "student"),
        teacher_model=str(workspace.root / "teacher"),
        args=DistillationConfig(output_dir=str(folder), **settings),
        train_dataset=rows,
    )


def of_gkd(folder: Path, beta: float, cap: float | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT)

    def model(seed: int, width: int) -> Any:
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=cap,
                attn_implementation="eager", pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )
        )  # fmt: skip

    rows = [
        [{"role": "user", "content": f"w{row} w{row + 1}"}, {"role": "assistant", "content": "w3 w4 w5" + " w6" * row}]
        for row in range(8)
    ]
    settings: dict[str, Any] = {
        **ON_CPU, "max_steps": 2, "per_device_train_batch_size": 4, "beta": beta, "lmbda": 0.0, "seed": 1,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return GKDTrainer(
        model=model(1, 16),
        teacher_model=model(2, 24),
        args=GKDConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=fast,
    )


def trained(trainer: Any) -> tuple[list[float], list[torch.Tensor]]:
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return logs, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the kernel had."""
    seen: list[int] = []
    kernel = vgs_kernels.integrations.linear_reverse_kl

    def counted(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(len(hidden))
        return kernel(hidden, *args, **options)

    monkeypatch.setattr(vgs_kernels.integrations, "linear_reverse_kl", counted)
    return seen


@pytest.mark.parametrize("name", ["distillation", "gkd"])
def test_the_loss_and_the_update_are_those_of_trl(
    name: str, workspace: Workspace, tmp_path: Path, calls: list[int]
) -> None:
    def trainer() -> Any:
        return of_gkd(tmp_path, 1.0) if name == "gkd" else of_distillation(workspace, tmp_path, 1.0)

    losses, parameters = trained(trainer())
    assert calls == []
    with patch_trl():
        ours, updated = trained(trainer())
    assert len(calls) == 2
    assert len(losses) == 2
    assert ours == pytest.approx(losses, rel=1e-4)
    for parameter, expected in zip(updated, parameters, strict=True):
        torch.testing.assert_close(parameter, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["distillation", "gkd", "capped gkd"])
def test_what_is_not_the_reverse_kl_stays_trl_s(
    name: str, workspace: Workspace, tmp_path: Path, calls: list[int]
) -> None:
    with patch_trl():
        trainer = (
            of_distillation(workspace, tmp_path, 0.5)
            if name == "distillation"
            else of_gkd(tmp_path, 0.5 if name == "gkd" else 1.0, cap=30.0 if "capped" in name else None)
        )
        losses, _ = trained(trainer)
    assert calls == []
    assert all(loss > 0 for loss in losses)


def test_the_patch_can_be_taken_back_and_is_made_once() -> None:
    before = distillation_trainer._chunked_divergence_loss, GKDTrainer.compute_loss
    with patch_trl():
        assert distillation_trainer._chunked_divergence_loss is not before[0]
        with patch_trl():
            pass
        assert distillation_trainer._chunked_divergence_loss is not before[0], "a second patch takes nothing back"
    assert (distillation_trainer._chunked_divergence_loss, GKDTrainer.compute_loss) == before


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    with pytest.raises(ImportError, match=r"patch_trl\(\) needs TRL 1.16"):
        patch_trl()
