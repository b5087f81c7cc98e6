"""The processor and models: real classes that survive a round trip through a folder."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from trl.data_utils import prepare_multimodal_messages
from vgs_distill.demo.models import IMAGE_PAD, IMAGE_TOKENS, TURN_END, VISION_TOKENS, banned_token_ids, build_processor
from vgs_distill.demo.supervised import tokenize_prompts
from vgs_distill.demo.worlds import messages


def conversations(examples):
    return [prepare_multimodal_messages(messages(one.question), images=[one.image]) for one in examples]


def encode(processor, examples):
    return processor.apply_chat_template(
        conversations(examples),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def test_the_processor_survives_saving_and_loading(processor, digits, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen3VLProcessor)
    assert loaded.tokenizer.padding_side == "left"
    examples = digits.balanced("test", 6, 0)
    before, after = encode(processor, examples), encode(loaded, examples)
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_a_prompt_holds_one_token_per_merged_cell_and_pads_on_the_left(processor, digits):
    batch = encode(processor, digits.balanced("test", 6, 0))
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    assert (batch["input_ids"] == image_id).sum(1).tolist() == [IMAGE_TOKENS] * 6
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == image_id)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 6
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"][:, 0].all(), "questions differ in length, so some rows are padded"


def test_the_pictures_reach_the_model_unresized(processor, digits):
    example = digits.balanced("test", 1, 0)[0]
    patches = encode(processor, [example])["pixel_values"]
    assert patches.shape == (16, 3 * 2 * 8 * 8)
    first = patches[0].view(3, 2, 8, 8)[:, 0]
    expected = torch.from_numpy(np.asarray(example.image)[:8, :8].copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(first, expected)


def test_the_shortcut_tokenizer_agrees_with_the_processor(processor, world):
    """`tokenize_prompts` skips the image processor; it must give the ids that training on prompts meets."""
    own = build_processor(world.words)
    examples = world.balanced("test", 24, 0)
    batch = encode(own, examples)
    expected = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert tokenize_prompts(own, [example.question for example in examples]) == expected
    assert own.tokenizer.unk_token_id not in {token for ids in expected for token in ids}


def test_completions_decode_to_themselves(processor, digits):
    example = digits.balanced("test", 1, 0)[0]
    ids = processor.tokenizer(example.completion + TURN_END)["input_ids"]
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == example.completion


def test_the_banned_tokens_are_the_vision_tokens(processor):
    assert processor.tokenizer.convert_ids_to_tokens(banned_token_ids(processor)) == list(VISION_TOKENS)


def test_the_model_survives_saving_and_loading(untrained, processor, digits, tmp_path):
    untrained.save_pretrained(tmp_path)
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = encode(processor, digits.balanced("test", 3, 0))
    with torch.no_grad():
        torch.testing.assert_close(untrained(**batch).logits, loaded(**batch).logits)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_the_model_reads_the_picture(untrained, processor, digits):
    batch = encode(processor, digits.balanced("test", 2, 0))
    with torch.no_grad():
        seen = untrained(**batch).logits
        blank = untrained(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    assert (seen - blank).abs().max() > 1e-3
