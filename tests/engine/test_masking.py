"""Which tokens are an image, and what a conversation is without one. The masked views: `tests/families`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import Qwen2Config
from vgs_distill.inputs.families import EvidenceTokens
from vgs_distill.masking import without_evidence


def test_images_and_videos_leave_a_conversation_and_nothing_else_does() -> None:
    picture = {"type": "image", "image": object()}
    text = {"type": "text", "text": "which colour?"}
    prompt = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [picture, {"type": "video"}, text, picture]},
    ]
    assert without_evidence(prompt) == [prompt[0], {"role": "user", "content": [text]}]
    assert len(prompt[1]["content"]) == 4, "the conversation itself is left alone"


def test_a_text_model_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="model type 'qwen2' names no image placeholder token"):
        EvidenceTokens.of(Qwen2Config(), processor.tokenizer)


def test_banned_tokens_are_placeholders_and_what_wraps_them(make_model: Callable[..., Any], processor: Any) -> None:
    tokens = EvidenceTokens.of(make_model(7).config, processor)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert tokens.banned_while_sampling == tuple(sorted(processor.tokenizer.convert_tokens_to_ids(names)))
