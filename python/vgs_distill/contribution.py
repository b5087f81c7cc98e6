"""How much the image raised each sampled token in the eyes of the teacher: log q - log r. Called by `loss.py`.

The sum over a completion is the log of how much likelier the teacher finds it with the image than without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vgs_kernels import LMHead

_MAX_LOGIT_BYTES = 64 * 2**20  # of the logits held at a time, fp32


@torch.no_grad()
def visual_contribution(
    teacher_hidden: Tensor,  # (rows, completion, width), with the image
    masked_teacher_hidden: Tensor,  # (rows, completion, width), without
    head: LMHead,
    token_ids: Tensor,  # (rows, completion), what was sampled
    mask: Tensor,  # (rows, completion), bool: tokens of rows with an image
    temperature: float,
) -> Tensor:
    """log q(token) - log r(token) in nats, (rows, completion); 0 where the mask is False: without an image r is q."""
    tokens_per_chunk = max(1, _MAX_LOGIT_BYTES // (4 * head.weight.size(0)))
    ids = token_ids[mask].split(tokens_per_chunk)

    def log_probs(hidden: Tensor) -> Tensor:
        chunks = hidden[mask].to(head.weight.dtype).split(tokens_per_chunk)
        return torch.cat([_log_probs(chunk, head, part, temperature) for chunk, part in zip(chunks, ids, strict=True)])

    contribution = torch.zeros(mask.shape, device=mask.device)
    contribution[mask] = log_probs(teacher_hidden) - log_probs(masked_teacher_hidden)
    return contribution


def _log_probs(hidden: Tensor, head: LMHead, token_ids: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / temperature
    return logits.gather(1, token_ids[:, None]).squeeze(1) - logits.logsumexp(1)
