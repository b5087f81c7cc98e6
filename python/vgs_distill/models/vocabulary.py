"""What two models have in common of their vocabularies."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..errors import InputError


def shared_vocabulary(student: PretrainedConfig, teacher: PretrainedConfig, tokens: int) -> int:
    """How many entries of the vocabulary both models have. They may be padded differently beyond the real `tokens`.

    InputError where the vocabularies cannot be the same.
    """
    sizes = [config.get_text_config().vocab_size for config in (student, teacher)]
    if sizes[0] == sizes[1]:
        return sizes[0]
    if min(sizes) < tokens:
        raise InputError(
            f"the student has {sizes[0]} entries in its vocabulary and the teacher {sizes[1]}, but the tokenizer has "
            f"{tokens} tokens; the teacher judges token by token, so choose one of the student's family"
        )
    return min(sizes)
