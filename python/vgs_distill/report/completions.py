"""The recorded completions of a run as the report shows them: pictures, coloured tokens, and what others answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .log import IMAGE_FOLDER, RunLog
from .page import NEED_SATURATION, SATURATION, data_uri, spaced, strength, tint

_SHOWN_STEPS = 8  # first, last and evenly spaced between, so that the file stays small


def completions_of(log: RunLog) -> list[dict[str, Any]]:
    """Step by step, the latest first."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in log.completions:
        by_step.setdefault(record["step"], []).append(record)
    return [
        {"step": step, "samples": [_sample(log.run_dir, record) for record in by_step[step]]}
        for step in reversed(spaced(list(by_step), _SHOWN_STEPS))
    ]


def _sample(run_dir: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    # Only the name: a path out of the folder would put any file of the machine into the page. So would a link.
    pictures = [data_uri(run_dir / IMAGE_FOLDER / Path(name).name, run_dir) for name in record["images"]]
    ratios = record["log_ratios"]
    finite = [value for value in ratios or [] if value is not None]
    return {
        "prompt": record["prompt"],
        "pictures": [picture for picture in pictures if picture is not None],
        "left_out": pictures.count(None),
        "tokens": _colored(record["tokens"], ratios, record["dependency"]),
        "total": sum(finite) if finite else None,
        "others": {who: record[who] for who in ("teacher", "reference") if record[who] is not None},
    }


def _colored(
    texts: Sequence[str], ratios: Sequence[float | None] | None, dependency: Sequence[float | None] | None
) -> list[dict[str, Any]]:
    """Tokens with their colour and the strength of their underline (`need`); those that end inside a character join the
    one that completes it (logs add, and divergences)."""
    tokens = []
    nothing = [None] * len(texts)
    total: float | None = 0.0
    need: float | None = 0.0
    for text, ratio, score in zip(texts, ratios or nothing, dependency or nothing, strict=True):
        total = None if ratio is None or total is None else total + ratio
        need = None if score is None or need is None else need + score
        if text:
            word = text.lstrip(" ") or text
            shown = word.replace("\n", "↵\n")  # a break would have no place for its colour
            colors = tint(total, SATURATION) | {
                "dependency": need,
                "need": 0 if need is None else strength(need, NEED_SATURATION),
            }
            tokens.append({"before": text[: len(text) - len(word)], "text": shown, **colors})
            total = need = 0.0
    return tokens
