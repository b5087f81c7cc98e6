"""A real Qwen3-VL processor and real Qwen3-VL models, at half a million parameters.

Everything a full-size run meets is here at its own class (tokenizer, image processor, chat template, M-RoPE,
DeepStack, `generate`), only small, so what the demo shows travels to a real checkpoint unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vgs_distill.demo.worlds import IMAGE_SIZE

if TYPE_CHECKING:
    from vgs_distill.demo.recipes import ModelSize

PATCH = 8
MERGE = 2
TEMPORAL_PATCH = 2
IMAGE_TOKENS = (IMAGE_SIZE // (PATCH * MERGE)) ** 2

PAD_TOKEN = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
UNKNOWN_TOKEN = "<|unknown|>"
VISION_TOKENS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
"""Never sampled: an image placeholder in a completion has no picture behind it and stops the forward pass."""

# Qwen's own turn format. Line breaks vanish in a word-level tokenizer, so the template needs none: 11 tokens around
# the question, image included.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|> ' + message['role'] + ' ' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|> assistant ' -}}{%- endif -%}
"""

# Qwen's 0.02 assumes width in the thousands; at width 64 it leaves the vision tower mute for hundreds of steps.
_INITIALIZER_RANGE = 0.06
_MAX_POSITIONS = 128
_ROPE_THETA = 10_000.0


def build_processor(words: Sequence[str]) -> Qwen3VLProcessor:
    """A `Qwen3VLProcessor` over a word-level vocabulary of `words` plus Qwen's special tokens.

    Prompts are padded on the left, as generation needs. Pictures keep their 32x32 pixels: 16 patches, 4 tokens.
    """
    specials = [PAD_TOKEN, TURN_START, TURN_END, *VISION_TOKENS, UNKNOWN_TOKEN]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*specials, "user", "assistant", *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=TURN_END,
        unk_token=UNKNOWN_TOKEN,
        additional_special_tokens=[TURN_START, *VISION_TOKENS],
        padding_side="left",
        model_max_length=_MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )
    pixels = IMAGE_SIZE * IMAGE_SIZE
    patches: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL_PATCH}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": pixels, "longest_edge": pixels},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            **patches,
        ),
        tokenizer=wrapped,
        video_processor=Qwen3VLVideoProcessor(cap_pixels_per_frame=True, **patches),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(size: ModelSize, processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """A freshly initialised model of `size` for the processor's vocabulary; seed torch before the call."""
    tokenizer = processor.tokenizer
    head_width = size.text_width // size.heads
    frequencies = head_width // 2
    third = frequencies // 3
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": 3 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": head_width,
        "max_position_embeddings": _MAX_POSITIONS,
        "initializer_range": _INITIALIZER_RANGE,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _ROPE_THETA,
            # Time, height and width share the head's frequencies; they must add up to all of them.
            "mrope_section": [frequencies - 2 * third, third, third],
            "mrope_interleaved": True,
        },
    }
    vision_config = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "intermediate_size": 3 * size.vision_width,
        "num_heads": size.heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "out_hidden_size": size.text_width,
        "num_position_embeddings": (IMAGE_SIZE // PATCH) ** 2,  # one learned position per patch, no resampling
        "deepstack_visual_indexes": [0],
        "initializer_range": _INITIALIZER_RANGE,
    }
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PAD),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_PAD),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
        tie_word_embeddings=False,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def banned_token_ids(processor: Qwen3VLProcessor) -> list[int]:
    """Ids to pass as `suppress_tokens` wherever a model of this processor samples."""
    return processor.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
