"""A diagnosis as it stands in JSON, of a half-warm student; made up."""

from __future__ import annotations

from typing import Any


def diagnosis(angle: float = 80.0) -> dict[str, Any]:
    price = {"seconds": 1.0, "kept_bytes": 1, "peak_bytes": None}
    groups = [60.0 + (angle - 60.0) * at / 9 for at in range(10)]
    return {
        "rows": 96, "tokens": 900, "standard": 0.46, "lang": 0.3, "vis": 0.4, "entropy": 0.5, "dependency": 0.2,
        "dependency_quantiles": [0.0] * 11, "lang_of_dependent": 0.7, "needs_image": 0.14, "cut_off": 0.0,
        "cosine": 0.9, "norms": {"standard": 1.0, "vis": 1.0}, "eta": {"1": 0.5, "2": 0.33, "4": 0.2},
        "angles": {"tokens": [90] * 10, "dependency": [0.1] * 10, "norms": {},
                   "angles": {"lang_vis": groups, "standard_vis": groups, "standard_lang": groups}},
        "prices": {"opd": price, "vgs": {**price, "seconds": 1.4}},
    }  # fmt: skip
