"""Masked views: what leaves the sequence, what stays, and that the masked image cannot be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config
from vgs_distill.masking import Batch, ImageTokens, drop_image, masked_view, rows_with_image


def encode(processor: Any, examples: list[Any], with_image: bool = True) -> Any:
    messages = []
    for example in examples:
        content = [{"type": "text", "text": example.question}]
        if with_image:
            content.insert(0, {"type": "image", "image": example.image})
        messages.append([{"role": "user", "content": content}])
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def examples(world: Any) -> list[Any]:
    found = world.balanced_test(6, seed=21)
    assert len({len(e.question.split()) for e in found}) > 1, "prompts of different length, so that padding matters"
    return found


@pytest.fixture(scope="module")
def batch(processor: Any, examples: list[Any]) -> Batch:
    encoded = dict(encode(processor, examples))
    ids, mask = encoded.pop("input_ids"), encoded.pop("attention_mask")
    completion = torch.randint(10, 20, (len(examples), 5), generator=torch.Generator().manual_seed(0))
    completion_mask = torch.ones_like(completion)
    completion_mask[2, 3:] = 0
    types = encoded["mm_token_type_ids"]
    encoded["mm_token_type_ids"] = torch.cat([types, types.new_zeros(completion.shape)], 1)
    return Batch(ids, mask, completion, completion_mask, encoded)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(7).eval()


@pytest.fixture(scope="module")
def tokens(model: Any) -> ImageTokens:
    return ImageTokens.of(model.config)


def hidden(model: Any, view: Batch) -> Tensor:
    with torch.no_grad():
        output = model.base_model(
            input_ids=view.input_ids, attention_mask=view.attention_mask, use_cache=False, **view.multimodal
        )
    return output.last_hidden_state[:, -view.completion_ids.size(1) :]


def test_drop_leaves_what_a_text_only_prompt_would_be(
    batch: Batch, tokens: ImageTokens, processor: Any, examples: list[Any]
) -> None:
    dropped = drop_image(batch, tokens)
    text_only = encode(processor, examples, with_image=False)
    assert torch.equal(dropped.prompt_ids * dropped.prompt_mask, text_only["input_ids"] * text_only["attention_mask"])
    assert torch.equal(dropped.prompt_mask, text_only["attention_mask"])
    assert dropped.multimodal == {}
    assert torch.equal(dropped.completion_ids, batch.completion_ids)


def test_drop_of_a_batch_without_images_changes_no_token(
    processor: Any, examples: list[Any], tokens: ImageTokens
) -> None:
    encoded = encode(processor, examples, with_image=False)
    nothing = torch.zeros(len(examples), 0, dtype=torch.long)
    batch = Batch(encoded["input_ids"], encoded["attention_mask"], nothing, nothing, {})
    dropped = drop_image(batch, tokens)
    assert torch.equal(dropped.prompt_ids * dropped.prompt_mask, batch.prompt_ids * batch.prompt_mask)
    assert not rows_with_image(batch, tokens).any()


@pytest.mark.parametrize("image_mask", ["drop", "blank", "attention"])
def test_a_masked_image_cannot_be_seen(batch: Batch, tokens: ImageTokens, model: Any, image_mask: str) -> None:
    other = batch._replace(
        multimodal={**batch.multimodal, "pixel_values": torch.randn_like(batch.multimodal["pixel_values"])}
    )
    real = batch.completion_mask.bool()
    assert not torch.allclose(hidden(model, batch)[real], hidden(model, other)[real], atol=1e-3)
    first = hidden(model, masked_view(image_mask, batch, tokens, model))
    second = hidden(model, masked_view(image_mask, other, tokens, model))
    torch.testing.assert_close(first[real], second[real], atol=1e-6, rtol=0)
    assert torch.isfinite(first).all()


def test_attention_keeps_the_positions_of_the_seen_image(batch: Batch, tokens: ImageTokens, model: Any) -> None:
    view = masked_view("attention", batch, tokens, model)
    positions = view.multimodal["position_ids"]
    expected, _ = model.base_model.get_rope_index(
        batch.input_ids, batch.multimodal["mm_token_type_ids"], batch.multimodal["image_grid_thw"],
        attention_mask=batch.attention_mask,
    )  # fmt: skip
    assert torch.equal(positions, expected)
    hidden_tokens = (batch.prompt_mask - view.prompt_mask).bool()
    assert torch.equal(hidden_tokens, tokens.is_placeholder(batch.prompt_ids))


def test_a_text_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names no image placeholder token"):
        ImageTokens.of(Qwen2Config())


def test_banned_tokens_are_placeholders_and_delimiters(tokens: ImageTokens, processor: Any) -> None:
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert tokens.banned_while_sampling == sorted(processor.tokenizer.convert_tokens_to_ids(names))
