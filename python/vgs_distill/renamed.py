"""Settings of earlier days, and what answers them. Light: the standard library only."""

from __future__ import annotations

# What settings of earlier days are called now, by their value.
OLD_NAMES: dict[str, dict[str, str]] = {
    "steering": {"none": "method='opd'", "exact": "eta='measured'", "amortized": "eta='amortized'"},
    "decomposition": {
        "bayes": "method='vgs_unit'",
        "matched": "method='matched'",
        "teacher_prior": "method='teacher_prior'",
    },
    "refresh_drift": {},
}


def renamed(name: str, value: object) -> str:
    """The sentence that answers a setting of earlier days."""
    known = OLD_NAMES[name]
    now = known.get(str(value), " or ".join(known.values()))
    return f"{name} is no setting any more; " + (f"write {now}" if now else "leave it out")
