"""The README's first example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_twenty_line_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    gradients = [p.grad for p in names["parameters"]]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    torch.testing.assert_close(norm, names["steered"].norm)
    assert 0 < norm <= 1.0 + 1e-5
