"""Every form in which people keep questions about pictures, turned into one: the rows that all other code knows.

A canonical row holds `prompt`, a conversation that ends where the student is to answer, and its evidence as a list
under the plural of the modality (`images`), ready for the processor. Every message is a role and a list of parts; a
part is text, or the place of one piece of evidence: `{"type": "image"}`. Other columns stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import logging

from ..errors import InputError
from .modalities import IMAGE, MODALITIES, Modality, pieces_of, read_piece

logger = logging.get_logger(__name__)

PROMPT_COLUMNS = ("prompt", "messages", "conversations")
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Where a part of a message may hold its evidence itself: a path, a URL, or what a column would hold.
PAYLOADS = (*MODALITIES, "image_url", "url", "path")


def canonical_row(
    row: Mapping[str, Any], modality: Modality = IMAGE, processor: Any = None, system_prompt: str | None = None
) -> dict[str, Any]:
    """The row in the one form above; a row that has it already stays as it is.

    * the prompt is `prompt`, else `messages`, else `conversations`: a text, which is one user turn; messages with role
      and content; or those of ShareGPT, with from and value;
    * answers at its end are left out, since the student writes its own;
    * `<image>` in a text is the place of an image; pictures for which there is no place come first in the first user
      turn, as in TRL;
    * a part of a message may hold its picture itself.

    Args:
        processor: knows the sampling rate of audio; None leaves that unchecked.
        system_prompt: the first message of a conversation that begins without one of the system.

    Raises:
        InputError: the row cannot be read in this way.
    """
    column = prompt_column(row)
    messages, pieces = arrange(row[column], pieces_of(row, modality), modality)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}, *messages]
    others = {name: value for name, value in row.items() if name not in (column, *modality.columns)}
    read = [read_piece(piece, modality, processor) for piece in pieces]
    return {"prompt": messages, modality.plural: read, **others}


def canonical_rows(
    rows: Iterable[Mapping[str, Any]],
    modality: Modality = IMAGE,
    processor: Any = None,
    system_prompt: str | None = None,
) -> list[dict[str, Any]]:
    """Several of them: the collator of a trainer."""
    return [canonical_row(row, modality, processor, system_prompt) for row in rows]


def prompt_column(columns: Iterable[str]) -> str:
    """The column that holds prompts; InputError if there is none."""
    names = list(columns)
    if found := [name for name in PROMPT_COLUMNS if name in names]:
        return found[0]
    raise InputError(
        f"there is no column 'prompt', 'messages' or 'conversations' (it has {', '.join(map(repr, names))}); name "
        "yours with prompt_column"
    )


def arrange(prompt: Any, pieces: list[Any], modality: Modality = IMAGE) -> tuple[list[dict[str, Any]], list[Any]]:
    """The prompt as canonical messages, and its evidence in the order of its places.

    pieces: those of the row's columns; they are not looked into, and fill the places that hold nothing themselves.

    Raises:
        InputError: it is no conversation, or places and pieces do not agree.
    """
    messages = _conversation(prompt)
    for message in messages:
        message["content"] = [
            part for written in _parts(message["content"]) for part in _canonical_parts(written, modality)
        ]
    places = [part for message in messages for part in message["content"] if part["type"] == modality.name]
    if pieces and not places:
        first = next(message for message in messages if message["role"] == "user")
        places = [{"type": modality.name} for _ in pieces]
        first["content"] = [*places, *first["content"]]
    waiting = sum(modality.name not in place for place in places)
    if waiting != len(pieces):
        raise InputError(
            f"its prompt has places for {waiting} {modality.plural}, but the row has {len(pieces)}; make them agree"
        )
    rest = iter(pieces)
    found = [place.pop(modality.name) if modality.name in place else next(rest) for place in places]
    return messages, found


def _conversation(prompt: Any) -> list[dict[str, Any]]:
    """New messages with role and content, up to the turn that is to be answered."""
    if (
        prompt is None
        or (isinstance(prompt, list | tuple) and not prompt)
        or (isinstance(prompt, str) and not prompt.strip())
    ):
        raise InputError("it has no prompt; remove the row or fill it in")
    if isinstance(prompt, str):
        logger.warning_once("prompts that are text are read as one user turn")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple):
        raise InputError(
            f"its prompt is of type {type(prompt).__name__}; write text, or messages with role and content"
        )
    messages = [_message(message) for message in prompt]
    while messages and messages[-1]["role"] == "assistant":
        logger.warning_once("answers at the end of prompts are left out: the student writes its own")
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise InputError("its prompt has no user turn; write [{'role': 'user', 'content': '...'}]")
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"its prompt ends in a {messages[-1]['role']!r} turn, which asks nothing; end it with a user turn"
        )
    return messages


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, Mapping):
        sharegpt = message.get("role") is None and message.get("from") is not None
        role, content = (message.get(name) for name in (("from", "value") if sharegpt else ("role", "content")))
        if role is not None and content is not None:
            role = _SHAREGPT.get(str(role), role) if sharegpt else role
            if role not in ROLES:
                raise InputError(f"a message has the unknown role {role!r}; use {', '.join(ROLES)}, or human and gpt")
            known = ("role", "content", "from", "value")
            more = {name: value for name, value in message.items() if name not in known and value is not None}
            return {"role": role, "content": content, **more}
    raise InputError(
        "it has a message without 'role' and 'content'; write prompts as [{'role': 'user', 'content': '...'}]"
    )


def _parts(content: Any) -> list[Any]:
    if not isinstance(content, str | list | tuple):
        raise InputError(
            f"the content of a message is of type {type(content).__name__}; write text, or a list of parts"
        )
    return [content] if isinstance(content, str) else list(content)


def _canonical_parts(part: Any, modality: Modality) -> list[dict[str, Any]]:
    """A part as it was written, as one or more canonical ones; a place that was given its evidence keeps it for now."""
    if isinstance(part, str):
        return _split_at_marks(part, modality.name)
    if not isinstance(part, Mapping):
        raise InputError(
            f"a part of a message is of type {type(part).__name__}; write {{'type': 'text', 'text': '...'}}"
        )
    held = {name: value for name, value in part.items() if value is not None}  # Arrow gives all parts the same names
    kind = held.get("type") or next((name for name in ("text", *MODALITIES) if name in held), None)
    if kind == "text" and isinstance(held.get("text"), str):
        return _split_at_marks(held["text"], modality.name)
    if (modality.name if kind == f"{modality.name}_url" else kind) != modality.name:
        raise InputError(
            f"a part of a message is of type {kind!r}; parts are 'text' with a 'text', or {modality.name!r} (set "
            "modality for another one)"
        )
    payload = next((held[name] for name in PAYLOADS if name in held), None)
    if isinstance(payload, Mapping) and "url" in payload:  # as OpenAI writes it
        payload = payload["url"]
    if payload is None and "base64" in held:
        payload = f"data:;base64,{held['base64']}"
    return [{"type": modality.name} if payload is None else {"type": modality.name, modality.name: payload}]


def _split_at_marks(text: str, name: str) -> list[dict[str, Any]]:
    """The text around every `<image>`, as LLaVA's data mark the place of one; a line break beside a mark is its own."""
    pieces = re.split(rf"\n?<{name}>\n?", text)
    if len(pieces) > 1:
        logger.warning_once("'<%s>' in a prompt is read as the place of one", name)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": name}] if number else []
        parts += [{"type": "text", "text": piece}] if piece or len(pieces) == 1 else []
    return parts
