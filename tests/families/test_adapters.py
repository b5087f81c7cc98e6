"""Every family: the layers that a LoRA adapter learns by default, and a model that its adapter was merged into.

Merged, a model is written under the hub's names, which in most families is not what the adapter calls its layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import ModelConfig
from vgs_distill.commands.export import export
from vgs_distill.inputs.formats import canonical_row
from vgs_distill.inputs.modalities import MODALITIES
from vgs_distill.masking import with_evidence
from vgs_distill.models.sources import ModelSource, adapter_config

from tests.families.models import SMALL_FAMILIES
from tests.families.test_families import every_family
from tests.families.training import processor_of, questions


def source(folder: Path) -> ModelSource:
    return ModelSource("student", str(folder), None, False, {"dtype": "auto"})


def adapted(family: str, tmp_path: Path) -> tuple[Any, dict[str, nn.Module]]:
    """The family's model with the default adapter, and the linear layers it had before by name."""
    import peft

    model = SMALL_FAMILIES[family].model(processor_of(family), 0, 32)
    model.save_pretrained(tmp_path / "base")
    model = source(tmp_path / "base").load()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modality = MODALITIES[SMALL_FAMILIES[family].modality]
    arguments = ModelConfig(model_name_or_path=str(tmp_path / "base"), use_peft=True, lora_r=4)
    return peft.get_peft_model(model, adapter_config(arguments, model, modality)), linear


@every_family
def test_the_default_adapter_learns_language_model_and_connector(family: str, tmp_path: Path) -> None:
    model, linear = adapted(family, tmp_path)
    base = model.get_base_model()
    adapted_layers = {name.removesuffix(".lora_A.default") for name, _ in base.named_modules() if "lora_A.d" in name}
    modality = SMALL_FAMILIES[family].modality
    tower, head = base.get_encoder(modality=modality), base.get_output_embeddings()
    inside = {id(module) for module in tower.modules()} if tower is not base else set()
    layers = dict(base.named_modules())
    in_tower = {name for name in linear if id(layers[name]) in inside and "merger" not in name}
    assert in_tower
    assert adapted_layers == {name for name in linear if name not in in_tower and layers[name] is not head}
    decoder = {id(module) for module in base.get_decoder().modules()}
    assert any(id(layers[name]) in decoder for name in adapted_layers)
    if family != "gemma3":  # whose connector is one matrix and no layer
        assert any(id(layers[name]) not in decoder for name in adapted_layers), "the connector learns, too"


@every_family
def test_a_merged_model_computes_what_its_adapter_did(family: str, tmp_path: Path) -> None:
    model, _ = adapted(family, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which starts at 0
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "run")
    processor: Any = processor_of(family)
    processor.save_pretrained(tmp_path / "run")
    said = export(tmp_path / "run", tmp_path / "merged", merge=True)
    assert said == "a model that from_pretrained loads"

    modality = MODALITIES[SMALL_FAMILIES[family].modality]
    row = canonical_row(questions((1,), modality=modality.name)[0], modality, processor)
    inputs = processor.apply_chat_template(
        [with_evidence(row, modality)], tokenize=True, return_dict=True, return_tensors="pt"
    )

    def logits(folder: Path) -> Tensor:
        with torch.no_grad():
            return source(folder).load().eval()(**inputs).logits

    with_adapter, merged, before = (logits(tmp_path / name) for name in ("run", "merged", "base"))
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-5)
    assert (merged - before).abs().max() > 100 * (merged - with_adapter).abs().max()
