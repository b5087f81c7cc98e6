"""What sampling needs of a processor: a token that ends an answer, one that pads, and a chat template."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import logging

from ..errors import InputError

logger = logging.get_logger(__name__)


def prepare_for_sampling(processor: Any, config: PretrainedConfig, generation: GenerationConfig | None = None) -> None:
    """Give the tokenizer the end token that the model names, where it has none, and that as padding.

    Args:
        processor: of the student, or its tokenizer; changed in place.
        config, generation: of the student; one of them may name the end token.

    Raises:
        InputError: nothing names one, so that no completion would end; or there is no chat template.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token_id is None:
        ends = (getattr(source, "eos_token_id", None) for source in (generation, config.get_text_config()))
        named = [end[0] if isinstance(end, list) else end for end in ends if end not in (None, [])]
        if not named:
            raise InputError(
                "neither the tokenizer nor the config of the student names an end token, so no completion would end; "
                "set tokenizer.eos_token and save it again"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])
        logger.warning_once(
            "the tokenizer has no end token, so that of the model's config is taken: %r", tokenizer.eos_token
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(processor, "chat_template", None) is None:
        raise InputError(
            "the processor of the student has no chat template, which makes the tokens of a conversation; set "
            "processor.chat_template and save it again"
        )
