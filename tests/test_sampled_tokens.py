"""What a linear call says of the sampled tokens, and the weights that token steering makes of it, in every place."""

from __future__ import annotations

import pytest
import torch

from tests.places import here
from tests.textbook import log_probs, visual_weights
from vgs_kernels import LMHead, TokenSteering, linear_decomposed_kl, linear_reverse_kl

TOKENS, WIDTH, VOCAB = 9, 24, 131


@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize("steering", [None, TokenSteering(4.0), TokenSteering(2.0, 0.3)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_sampled_tokens_are_those_of_the_textbook(
    smoothing: float, steering: TokenSteering | None, offset: float, chosen: str
) -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(here().device)

    student, masked_student, teacher, masked_teacher = (drawn(TOKENS, WIDTH) / 3 for _ in range(4))
    heads = [LMHead(drawn(VOCAB, WIDTH), drawn(VOCAB) + offset) for _ in range(2)]
    sampled = torch.randint(VOCAB, (TOKENS,), generator=generator, device="cpu").to(here().device)
    result = linear_decomposed_kl(
        student, heads[0], teacher, heads[1], masked_teacher, masked_student, decomposition="vgs",
        sampled_tokens=sampled, token_steering=steering, teacher_smoothing=smoothing, backend=chosen,
    )  # fmt: skip

    def of(hidden: torch.Tensor, head: LMHead, eps: float = 0.0) -> torch.Tensor:
        assert head.bias is not None
        return log_probs((hidden @ head.weight.t() + head.bias).double(), smoothing=eps)

    log_p = of(student, heads[0])
    log_q, log_r = (of(hidden, heads[1], smoothing) for hidden in (teacher, masked_teacher))
    assert result.sampled is not None
    for found, expected in zip(result.sampled, (log_p, log_q, log_r), strict=True):
        assert found is not None
        at = expected.gather(1, sampled[:, None]).squeeze(1)
        torch.testing.assert_close(found.double(), at, atol=2e-5, rtol=1e-5)
    strength, plausibility = (steering.strength, steering.plausibility) if steering else (0.0, 0.0)
    weights = visual_weights(log_q, log_r, sampled, strength, plausibility)
    torch.testing.assert_close(result.applied_vis_weights.double(), weights, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        result.vis.double(), (weights * result.per_token.vis.double()).sum(), atol=1e-4, rtol=1e-4
    )


def test_plain_distillation_knows_the_sampled_tokens_too(chosen: str) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (
        torch.randn(TOKENS, WIDTH, generator=generator, device="cpu").to(here().device) for _ in range(2)
    )
    heads = [torch.randn(VOCAB, WIDTH, generator=generator, device="cpu").to(here().device) for _ in range(2)]
    sampled = torch.randint(VOCAB, (TOKENS,), generator=generator, device="cpu").to(here().device)
    found = linear_reverse_kl(
        student, LMHead(heads[0]), teacher, LMHead(heads[1]), sampled_tokens=sampled, backend=chosen
    ).sampled
    assert found is not None
    assert found.masked_teacher is None
    for got, hidden, head in ((found.student, student, heads[0]), (found.teacher, teacher, heads[1])):
        expected = log_probs((hidden @ head.t()).double()).gather(1, sampled[:, None]).squeeze(1)
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
