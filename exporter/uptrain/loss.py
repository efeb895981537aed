"""What is made small: cross-entropy, and where there is a teacher the distance from it (Hinton 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Output = tuple[Tensor, list[Tensor]]  # logits [B·T,V], hidden states [B·T,d] after each layer


@dataclass(frozen=True)
class Loss:
    """Means over all positions, as scalar tensors: `total` is cross_entropy + kl_weight · kl + hidden_weight · hidden.

    cross_entropy and kl are nats a token; hidden is the squared distance of a position's hidden state over the teacher's
    squared norm there, so that the few positions of huge norm do not outweigh the rest. Both are 0 without a teacher.
    """

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor
    hidden: Tensor


def loss(student: Output, targets_BT: Tensor, teacher: Output | None, kl_weight: float, hidden_weight: float) -> Loss:
    """In float32, whatever the dtype of the logits."""
    scores = F.log_softmax(student[0], -1, dtype=torch.float32)
    cross_entropy = F.nll_loss(scores, targets_BT.flatten())
    kl = hidden = torch.zeros_like(cross_entropy)
    if teacher is not None and kl_weight:
        wanted = F.log_softmax(teacher[0], -1, dtype=torch.float32)
        kl = F.kl_div(scores, wanted, reduction="batchmean", log_target=True)
    if teacher is not None and hidden_weight:
        distances = [
            ((ours.float() - theirs.float()).square().sum(-1) / theirs.float().square().sum(-1)).mean()
            for ours, theirs in zip(student[1], teacher[1], strict=True)
        ]
        hidden = torch.stack(distances).mean()
    return Loss(cross_entropy + kl_weight * kl + hidden_weight * hidden, cross_entropy, kl, hidden)
