"""Retrieval recall.

Shapes: N images, M texts.
"""

import torch
from torch import Tensor


def recall_at_k(similarity_NM: Tensor, image_of_text_M: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at each k, both directions, over one pool.

    Image to text counts an image as found if at least one of its texts is among the k nearest; text to image counts
    each text. Ties are broken against us: a wrong candidate of equal similarity ranks before the right one.

    Args:
        image_of_text_M: index of the image that text j describes.

    Returns:
        ``image_to_text_recall_at_<k>`` and ``text_to_image_recall_at_<k>``.
    """
    images = similarity_NM.shape[0]
    own_NM = image_of_text_M[None, :] == torch.arange(images, device=similarity_NM.device)[:, None]
    best_own_N = similarity_NM.masked_fill(~own_NM, -torch.inf).amax(dim=1)
    # "Not smaller" rather than "at least": nothing is found by a model whose similarities are not numbers.
    wrong_before_N = (~(similarity_NM < best_own_N[:, None]) & ~own_NM).sum(dim=1)
    own_M = similarity_NM.T.gather(1, image_of_text_M[:, None])
    wrong_before_M = (~(own_M > similarity_NM.T) & ~own_NM.T).sum(dim=1)
    found = {}
    for k in ks:
        found[f"image_to_text_recall_at_{k}"] = (wrong_before_N < k).float().mean().item()
        found[f"text_to_image_recall_at_{k}"] = (wrong_before_M < k).float().mean().item()
    return found
