"""The methods of a run: which parts of the loss make its update, and how they are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Method:
    r"""One update from up to three parts of the loss, g_a, g_b and g_c their gradients.

    With a length of its own (`unit` False), and η such that the length of g_a is kept:
    η [ g_a + γ g_b + λ g_c ], η = |g_a| / |g_a + γ g_b|. With `unit`: (1 − γ) g_a / |g_a| + γ g_b / |g_b|.

    The parts, over student p, teacher q, both with the image masked p₀ and r, and q* ∝ p₀ q / r:

    | part       | value                 | gradient reaches             |
    |------------|-----------------------|------------------------------|
    | `standard` | KL(p ‖ q)             | the student with the image   |
    | `vis`      | KL(p ‖ q*)            | the student with the image   |
    | `lang`     | KL(p₀ ‖ r)            | the student without it       |
    | `prior`    | KL(p ‖ r)             | the student with the image   |
    | `evidence` | KL(p ‖ q) − KL(p ‖ r) | the student with the image   |

    `preserved` is g_c, of the tokens that depend most on the image only.
    """

    name: str
    first: str
    second: str | None = None
    preserved: str | None = None
    unit: bool = False
    gamma: float = 0.0  # the default

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in (self.first, self.second, self.preserved) if part is not None)

    @property
    def masks_teacher(self) -> bool:
        """Whether the teacher runs without the image, too."""
        return self.second is not None

    @property
    def masks_student(self) -> bool:
        """Whether the student runs without the image, too."""
        return not {"lang", "vis"}.isdisjoint(self.parts)

    @property
    def pair(self) -> tuple[str, ...]:
        """The two parts whose gradients are weighed, as they are called where they are logged."""
        return tuple(self.label.get(part, part) for part in (self.first, self.second) if part is not None)

    @property
    def label(self) -> dict[str, str]:
        """What parts are called where they are logged: `teacher_prior` calls its own lang and vis."""
        return {"prior": "lang", "evidence": "vis"}


METHODS = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("vgs", "standard", "vis", "lang", gamma=2.0),
            Method("opd", "standard"),
            Method("vgs_unit", "lang", "vis", unit=True, gamma=0.8),
            Method("matched", "lang", "standard", unit=True, gamma=0.8),
            Method("teacher_prior", "prior", "evidence", unit=True, gamma=0.8),
            Method("language", "standard", "lang", "vis", gamma=1.0),
        )
    }
)
