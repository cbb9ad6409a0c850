"""Which samples of a batch make a model's numbers overflow.

Shapes: B batch, C channels, H height, W width, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coca.objective import Cached, Features
from coca.parallel import unwrapped


@torch.no_grad()
def nonfinite_samples(
    objective: nn.Module, images_BCHW: Tensor, tokens_BT: Tensor, sample_ids: Sequence[str]
) -> list[str]:
    """The ids, in their order, of this rank's samples whose features or caption loss are not finite.

    One forward pass a sample, under the caller's autocast, so that a bad one shows no other as bad. None are named
    where only gradients overflow, all where the weights themselves are no numbers.

    Args:
        objective: what ``parallelize`` gave. Every rank calls with equally many samples, since FSDP2 gathers weights.
    """
    zero = images_BCHW.new_zeros(())
    # As one of many parts of a batch: no rank's numbers enter another's, and what stands in for the contrastive loss is
    # finite where the features are, since no number times zero is no number.
    alone = Cached(Features(zero, zero), tuple(zero for _ in unwrapped(objective).scalars), torch.ones_like(zero))
    return [
        sample_id
        for index, sample_id in enumerate(sample_ids)
        if not _is_finite(objective(images_BCHW[index : index + 1], tokens_BT[index : index + 1], None, alone))
    ]


def _is_finite(losses: tuple[Tensor, ...]) -> bool:
    return bool(torch.stack([loss.float() for loss in losses]).isfinite().all())
