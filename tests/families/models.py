"""Every supported family at a few ten thousand parameters, from its own `transformers` classes and its own processor.

Nothing is downloaded: tokenizers are word-level and built here with the special tokens that the processor asks for,
image processors are constructed directly. What a full-size checkpoint meets in the engine (image token expansion,
tiles, M-RoPE, prefix attention, soft caps) is met here by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

WORDS = ("which", "colour", "is", "it", "what", "do", "you", "see", "left", "right", "and", "red", "green", "blue")
ROLES = ("system", "user", "assistant")
PAD, TURN_START, TURN_END, UNKNOWN = "<pad>", "<turn>", "</turn>", "<unk>"
HEADS = 4
STUDENT_WIDTH, TEACHER_WIDTH, VISION_WIDTH = 32, 48, 32


@dataclass(frozen=True)
class SmallFamily:
    """How to build a processor and models of one family."""

    model_type: str
    build_processor: Callable[[], ProcessorMixin]
    build_config: Callable[[ProcessorMixin, int], Any]  # of the text width
    modality: str = "image"

    @property
    def name(self) -> str:
        return self.model_type if self.modality in ("image", "audio") else f"{self.model_type}_{self.modality}"

    def processor(self) -> ProcessorMixin:
        return self.build_processor()

    def model(self, processor: ProcessorMixin, seed: int, width: int = STUDENT_WIDTH) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = hf.AutoModelForMultimodalLM.from_config(self.build_config(processor, width))
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)  # Gemma 3's projector starts at 0, which hides every image
        tokenizer = processor.tokenizer
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model.eval()


def _tokenizer(written: dict[str, str], extra: tuple[str, ...] = (), **named: str) -> PreTrainedTokenizerFast:
    """`written`: what the template writes for an image, say; `named` become attributes that a processor reads."""
    specials = [PAD, TURN_START, TURN_END, UNKNOWN, *dict.fromkeys([*extra, *named.values()])]
    vocabulary = {word: index for index, word in enumerate([*specials, *ROLES, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=TURN_START,
        eos_token=TURN_END,
        unk_token=UNKNOWN,
        extra_special_tokens=named or list(extra),
        padding_side="left",
        model_max_length=256,
        chat_template=_template(written),
    )


def _template(written: dict[str, str]) -> str:
    """Turns of one role each; a part that is no text is written as `written` says, and nothing where there is none."""
    cases = "".join(
        "{%- if part['type'] == '" + kind + "' -%}{{- '" + text + "' -}}{%- endif -%}" for kind, text in written.items()
    )
    return (
        "{%- for message in messages -%}{{- '<turn> ' + message['role'] + ' ' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        + cases
        + "{%- if part['type'] == 'text' -%}{{- ' ' + part['text'] -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{- ' </turn> ' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<turn> assistant ' -}}{%- endif -%}"
    )


def _text(processor: ProcessorMixin, width: int, **more: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": width // HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "initializer_range": 0.2,
        **more,
    }


def _id(processor: ProcessorMixin, token: str) -> int:
    return processor.tokenizer.convert_tokens_to_ids(token)


# ------------------------------------------------------------------ Qwen

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_EVIDENCE = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _qwen_processor(kind: str, video: type) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        patches: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
        tokenizer = _tokenizer(QWEN_EVIDENCE, QWEN_TOKENS)
        return getattr(hf, kind)(
            image_processor=hf.Qwen2VLImageProcessor(
                size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, **HALF, **patches
            ),
            tokenizer=tokenizer,
            video_processor=video(size={"shortest_edge": 4 * 16 * 16, "longest_edge": 4 * 32 * 32}, **patches),
            chat_template=tokenizer.chat_template,
        )

    return build


def _qwen_ids(processor: ProcessorMixin) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: _id(processor, token) for name, token in zip(names, QWEN_TOKENS, strict=True)}


def _mrope(width: int) -> dict[str, Any]:
    frequencies = width // HEADS // 2
    third = frequencies // 3
    return {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [frequencies - 2 * third, third, third],
    }


def _qwen3_config(processor: ProcessorMixin, width: int) -> Any:
    vision = {
        "depth": 2, "hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_heads": HEADS, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": width, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0], "initializer_range": 0.2,
    }  # fmt: skip
    rope = {**_mrope(width), "mrope_interleaved": True}
    return hf.Qwen3VLConfig(
        text_config=_text(processor, width, rope_parameters=rope), vision_config=vision, **_qwen_ids(processor)
    )


def _qwen25_config(processor: ProcessorMixin, width: int) -> Any:
    vision = {
        "depth": 2, "hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_heads": HEADS, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": width, "window_size": 32,
        "fullatt_block_indexes": [1], "initializer_range": 0.2,
    }  # fmt: skip
    text = _text(processor, width, rope_parameters=_mrope(width))
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(processor))


def _qwen2_config(processor: ProcessorMixin, width: int) -> Any:
    vision = {
        "depth": 2, "embed_dim": VISION_WIDTH, "hidden_size": width, "mlp_ratio": 2, "num_heads": HEADS,
        "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2,
    }  # fmt: skip
    text = _text(processor, width, rope_parameters=_mrope(width))
    return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_ids(processor))


# ------------------------------------------------------------------ Idefics3 and SmolVLM

IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
IDEFICS_IMAGES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _idefics_processor() -> ProcessorMixin:
    tokenizer = _tokenizer({"image": "<image>"}, IDEFICS_TOKENS)
    return hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(**IDEFICS_IMAGES),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )


def _smolvlm_processor() -> ProcessorMixin:
    tokenizer = _tokenizer({"image": "<image>"}, (*IDEFICS_TOKENS, "<video>"))
    return hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**IDEFICS_IMAGES),
        tokenizer=tokenizer,
        video_processor=hf.SmolVLMVideoProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, num_frames=2, fps=1
        ),
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )


def _idefics_config(kind: str) -> Callable[[ProcessorMixin, int], Any]:
    def build(processor: ProcessorMixin, width: int) -> Any:
        return getattr(hf, kind)(
            text_config={"model_type": "llama", **_text(processor, width)},
            vision_config=_vision(image_size=32, patch_size=8),
            scale_factor=2,
            image_token_id=_id(processor, "<image>"),
            pad_token_id=processor.tokenizer.pad_token_id,
        )

    return build


# ------------------------------------------------------------------ LLaVA

PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _llava_next_processor() -> ProcessorMixin:
    tokenizer = _tokenizer({"image": "<image>"}, ("<image>",))
    return hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=tokenizer.chat_template,
    )


def _llava_next_config(processor: ProcessorMixin, width: int) -> Any:
    return hf.LlavaNextConfig(
        text_config={"model_type": "mistral", **_text(processor, width)},
        vision_config={"model_type": "clip_vision_model", **_vision(image_size=32, patch_size=8)},
        image_grid_pinpoints=PINPOINTS,
        image_token_index=_id(processor, "<image>"),
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )


def _llava_onevision_processor() -> ProcessorMixin:
    tokenizer = _tokenizer({"image": "<image>"}, ("<image>", "<video>"))
    return hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def _llava_onevision_config(processor: ProcessorMixin, width: int) -> Any:
    return hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text(processor, width)},
        vision_config={"model_type": "siglip_vision_model", **_vision(image_size=32, patch_size=8)},
        image_grid_pinpoints=PINPOINTS,
        image_token_index=_id(processor, "<image>"),
        video_token_index=_id(processor, "<video>"),
    )


# ------------------------------------------------------------------ Gemma 3 and PaliGemma


def _gemma3_processor() -> ProcessorMixin:
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer({"image": "<start_of_image>"}, (), **tokens)
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


def _gemma3_config(processor: ProcessorMixin, width: int) -> Any:
    layers = ["sliding_attention", "full_attention"]
    text = _text(processor, width, sliding_window=8, layer_types=layers, query_pre_attn_scalar=width // HEADS)
    return hf.Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **_vision(image_size=32, patch_size=8)},
        mm_tokens_per_image=4,
        image_token_index=_id(processor, "<image_soft_token>"),
        boi_token_index=_id(processor, "<start_of_image>"),
        eoi_token_index=_id(processor, "<end_of_image>"),
    )


def _paligemma_processor() -> ProcessorMixin:
    tokenizer = _tokenizer({"image": "<image>"}, ("<image>",), image_token="<image>")
    return hf.PaliGemmaProcessor(
        image_processor=hf.SiglipImageProcessor(size={"height": 32, "width": 32}, image_seq_length=16),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _paligemma_config(processor: ProcessorMixin, width: int) -> Any:
    return hf.PaliGemmaConfig(
        text_config={"model_type": "gemma2", **_text(processor, width, sliding_window=64, final_logit_softcapping=5.0)},
        vision_config={"model_type": "siglip_vision_model", **_vision(image_size=32, patch_size=8)},
        image_token_index=_id(processor, "<image>"),
        projection_dim=width,
        hidden_size=width,
        vocab_size=len(processor.tokenizer),
    )


# ------------------------------------------------------------------ InternVL


def _internvl_processor() -> ProcessorMixin:
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer({"image": "<IMG_CONTEXT>"}, (), **tokens)
    return hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


def _internvl_config(processor: ProcessorMixin, width: int) -> Any:
    return hf.InternVLConfig(
        text_config={"model_type": "qwen2", **_text(processor, width)},
        vision_config=_vision(image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=_id(processor, "<IMG_CONTEXT>"),
        image_seq_length=4,
    )


# ------------------------------------------------------------------ Qwen2-Audio

AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")


def _qwen2_audio_processor() -> ProcessorMixin:
    tokenizer = _tokenizer({"audio": "".join(AUDIO_TOKENS)}, AUDIO_TOKENS)
    return hf.Qwen2AudioProcessor(
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _qwen2_audio_config(processor: ProcessorMixin, width: int) -> Any:
    tower = {
        "d_model": VISION_WIDTH, "encoder_layers": 2, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 64,
        "num_mel_bins": 16, "max_source_positions": 50, "initializer_range": 0.2,
    }  # fmt: skip
    return hf.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **tower},
        text_config={"model_type": "qwen2", **_text(processor, width)},
        audio_token_index=_id(processor, "<|AUDIO|>"),
    )


SMALL_FAMILIES = {
    family.name: family
    for family in (
        SmallFamily("qwen3_vl", _qwen_processor("Qwen3VLProcessor", hf.Qwen3VLVideoProcessor), _qwen3_config),
        SmallFamily("qwen2_5_vl", _qwen_processor("Qwen2_5_VLProcessor", hf.Qwen2VLVideoProcessor), _qwen25_config),
        SmallFamily("qwen2_vl", _qwen_processor("Qwen2VLProcessor", hf.Qwen2VLVideoProcessor), _qwen2_config),
        SmallFamily("smolvlm", _smolvlm_processor, _idefics_config("SmolVLMConfig")),
        SmallFamily("idefics3", _idefics_processor, _idefics_config("Idefics3Config")),
        SmallFamily("llava_onevision", _llava_onevision_processor, _llava_onevision_config),
        SmallFamily("llava_next", _llava_next_processor, _llava_next_config),
        SmallFamily("gemma3", _gemma3_processor, _gemma3_config),
        SmallFamily("internvl", _internvl_processor, _internvl_config),
        SmallFamily("paligemma", _paligemma_processor, _paligemma_config),
        SmallFamily("qwen3_vl", _qwen_processor("Qwen3VLProcessor", hf.Qwen3VLVideoProcessor), _qwen3_config, "video"),
        SmallFamily(
            "qwen2_5_vl", _qwen_processor("Qwen2_5_VLProcessor", hf.Qwen2VLVideoProcessor), _qwen25_config, "video"
        ),
        SmallFamily("qwen2_vl", _qwen_processor("Qwen2VLProcessor", hf.Qwen2VLVideoProcessor), _qwen2_config, "video"),
        SmallFamily("qwen2_audio", _qwen2_audio_processor, _qwen2_audio_config, "audio"),
    )
}
