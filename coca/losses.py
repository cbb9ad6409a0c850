"""The two losses of CoCa. Averaged over ranks (as DDP averages gradients), each gives what one process with the whole
batch would.

Shapes: N local rows, G global rows, E embedding, T positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from coca.distributed import gather, rank, sum_over_ranks, world_size


def contrastive_loss(image_features_NE: Tensor, text_features_NE: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the global batch: this rank's rows against every rank's columns.

    The mean of both directions, as CLIP has it (the paper's formula adds them): identical embeddings give ln G.

    Args:
        image_features_NE, text_features_NE: unit length, row i of one belongs to row i of the other.
        logit_scale: scalar, the inverse temperature.
    """
    image_features_GE, text_features_GE = gather(image_features_NE), gather(text_features_NE)
    rows = image_features_NE.shape[0]
    target_N = torch.arange(rows, device=image_features_NE.device) + rank() * rows
    image_to_text = F.cross_entropy(logit_scale * image_features_NE @ text_features_GE.T, target_N)
    text_to_image = F.cross_entropy(logit_scale * text_features_NE @ image_features_GE.T, target_N)
    return (image_to_text + text_to_image) / 2


def captioning_loss(logits_NTV: Tensor, tokens_NT: Tensor, pad_id: int) -> Tensor:
    """Cross-entropy of the next token, averaged over the real tokens of the global batch.

    Args:
        logits_NTV: position t predicts token t + 1; T - 1 positions.
        tokens_NT: padded on the right with ``pad_id``.
    """
    target_NT = tokens_NT[:, 1:]
    total = F.cross_entropy(logits_NTV.flatten(0, 1), target_NT.flatten(), ignore_index=pad_id, reduction="sum")
    real_tokens = sum_over_ranks((target_NT != pad_id).sum())
    return total * world_size() / real_tokens
