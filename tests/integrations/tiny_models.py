"""Tiny Qwen-VL students and teachers with Qwen's own token ids, which ms-swift has as constants; rows with pictures.

python tests/integrations/tiny_models.py FOLDER [--short]    --short: few ids, for engines that read configs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_TEXT = 151643  # ids before the special ones
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in p %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ((220, 30, 30), (30, 200, 60), (40, 60, 220))


def tokenizer(short: bool) -> Any:
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [] if short else [f"\u2400{number}" for number in range(len(words), QWEN_TEXT)]
    whole = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=SPECIAL[0], eos_token=SPECIAL[2], padding_side="left", chat_template=TEMPLATE
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return fast


def save(kind: str, role: str, width: int, seed: int, tokens: Any, folder: Path) -> None:
    torch.manual_seed(seed)
    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ids |= {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    third = width // 24
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [width // 8 - 2 * third, third, third]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": width,
    }  # fmt: skip
    text = {
        "vocab_size": len(tokens), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 2048,
        "rope_parameters": rope, "pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id,
    }  # fmt: skip
    common = {
        "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen3_vl":
        rope["mrope_interleaved"] = True
        vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        names, patch, pixels = "Qwen3VL", 16, (64, 128)
    else:
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        names, patch, pixels = "Qwen2_5_VL", 14, (56, 112)
    config = getattr(transformers, f"{names}Config")(text_config=text, vision_config=vision, **common)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = (
        tokens.pad_token_id,
        tokens.eos_token_id,
    )
    videos = transformers.Qwen3VLVideoProcessor if kind == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{names}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            min_pixels=pixels[0] ** 2, max_pixels=pixels[1] ** 2, patch_size=patch
        ),
        tokenizer=tokens,
        video_processor=videos(patch_size=patch),
        chat_template=TEMPLATE,
    )
    for part in (model, processor):
        part.save_pretrained(folder / f"{kind}-{role}")


def main(name: str, *flags: str) -> None:
    folder = Path(name)
    tokens = tokenizer("--short" in flags)
    for kind in ("qwen3_vl", "qwen2_5_vl"):
        for role, width, seed in (("student", 48, 0), ("teacher", 96, 1)):
            save(kind, role, width, seed, tokens, folder)
    rows = []
    for number in range(16):
        picture = folder / f"{number}.png"
        Image.new("RGB", (96, 96), COLOURS[number % 3]).save(picture)
        ask = {"role": "user", "content": "<image>What colour?"}
        rows.append({"messages": [ask, {"role": "assistant", "content": "red"}], "images": [str(picture)]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
