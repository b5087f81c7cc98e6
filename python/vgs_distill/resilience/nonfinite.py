"""Updates skipped because a loss or a gradient is not finite: what is said of them, and when training gives up.

All processes skip an update together; the reasons are those that this process saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import TrainingStopped

logger = logging.get_logger(__name__)

_NAMED_ROWS = 4  # in one message
_EXCERPT = 60  # characters


class SkippedUpdates:
    """Counts skipped updates in a row, names each, and stops training at `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._reasons: list[str] = []

    def note(self, reason: str) -> None:
        """Keep a reason, seen by this process, for skipping the running step."""
        self._reasons.append(reason)

    def skip(self, step: int) -> None:
        """Say that the update of `step` is skipped; TrainingStopped if that is one too many."""
        reasons = "; ".join(self._reasons) or "not finite on another process"
        self._reasons.clear()
        self.in_a_row += 1
        logger.warning("step %d: %s; the update is skipped.", step, reasons)
        if self.in_a_row >= self.limit:
            raise TrainingStopped(
                f"training stopped at step {step}: {self.in_a_row} updates in a row were skipped, the last because "
                f"{reasons}; look at the rows named, lower learning_rate or raise max_skipped_steps, and resume from "
                "the last checkpoint"
            )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row = state["in_a_row"]


def describe_tokens(inputs: dict[str, Any], places: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Tokens of a micro-batch whose loss is not finite; `places`: row and completion position of each, (count, 2)."""
    row, position = places[0].tolist()
    token = tokenizer.decode(inputs["completion_ids"][row, position])
    rows = describe_rows(inputs, places[:, 0].unique().tolist(), tokenizer)
    return (
        f"the loss of {len(places)} token(s) is not finite, first at completion position {position} ({token!r}) of row "
        f"{row}, in {rows} of the micro-batch: the student put probability where a teacher has none, or an input is "
        "not finite"
    )


def describe_rows(inputs: dict[str, Any], rows: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Rows of a micro-batch by position and the beginning of their prompt."""
    listed = list(rows)
    parts = [f"row {row} ({_excerpt(inputs, row, tokenizer)!r})" for row in listed[:_NAMED_ROWS]]
    if len(listed) > _NAMED_ROWS:
        parts.append(f"{len(listed) - _NAMED_ROWS} more")
    return ", ".join(parts)


def describe_step(micro_batches: Sequence[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """All rows of a step, where its sum is wrong and does not say why."""
    return "; ".join(
        f"micro-batch {index}: {describe_rows(inputs, range(len(inputs['prompt_ids'])), tokenizer)}"
        for index, inputs in enumerate(micro_batches or ())
    )


def _excerpt(inputs: dict[str, Any], row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens: Tensor = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    text = " ".join(str(tokenizer.decode(tokens, skip_special_tokens=True)).split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
