"""Captions from images.

Shapes: B batch, C channels, H height, W width, T tokens, V vocabulary, E embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from coca.layers import KeyValueCache
from coca.model import CoCa


class Generation(NamedTuple):
    """Token ids with begin and end, padded after the end, and the image embedding from the same pass."""

    tokens_BT: Tensor
    image_features_BE: Tensor


@torch.inference_mode()
def generate(
    model: CoCa,
    images_BCHW: Tensor,
    *,
    begin_id: int,
    end_id: int,
    pad_id: int,
    max_length: int | None = None,
) -> Generation:
    """Greedy captions. The image is encoded once; each step runs one position, on cached keys and values.

    Args:
        max_length: tokens of the longest caption, begin and end included; at most (and by default) the context length.
            A caption that reaches it is cut there, without an end.
    """
    text = model.config.text
    max_length = min(max_length or text.context_length, text.context_length)
    image_features_BE, image_tokens_BQD = model.encode_image(images_BCHW)
    image_keys_values = model.multimodal.image_keys_values(image_tokens_BQD)
    batch = images_BCHW.shape[0]

    def new_caches(count: int) -> list[KeyValueCache]:
        head_width = text.width // text.heads
        return [
            KeyValueCache.allocate(batch, text.heads, max_length, head_width, image_tokens_BQD) for _ in range(count)
        ]

    unimodal_caches, multimodal_caches = new_caches(text.unimodal_layers), new_caches(text.multimodal_layers)
    tokens_BT = torch.full((batch, max_length), pad_id, device=images_BCHW.device)
    tokens_BT[:, 0] = begin_id
    finished_B = torch.zeros(batch, dtype=torch.bool, device=images_BCHW.device)
    length = 1
    while length < max_length:
        hidden_B1D = model.unimodal.step(tokens_BT[:, length - 1 : length], unimodal_caches)
        logits_BV = model.multimodal(hidden_B1D, image_keys_values, multimodal_caches)[:, -1]
        logits_BV[:, [pad_id, begin_id]] = -torch.inf  # never part of a caption
        next_B = logits_BV.argmax(dim=-1).masked_fill(finished_B, pad_id)
        tokens_BT[:, length] = next_B
        finished_B |= next_B == end_id
        length += 1
        if bool(finished_B.all()):
            break
    return Generation(tokens_BT[:, :length], image_features_BE)
