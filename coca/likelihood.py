"""How likely a model finds captions of images: classification by captioning (Tschannen et al. 2023, section 3).

Shapes: N images, K captions, C channels, H height, W width, T tokens, D width, M captions of one step,
P predicted positions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from coca.model import CoCa

_ROWS = 1024  # positions whose logits are held at a time: 262 MB for 64,000 entries


@torch.inference_mode()
def caption_log_likelihood(model: CoCa, images_NCHW: Tensor, tokens_KT: Tensor, *, step: int = 64) -> Tensor:
    """Log-likelihoods (N, K) of every caption for every image: the sum over its tokens, the end included.

    The unimodal decoder does not see images, so it runs once for each caption, the encoder once for each image; only
    the multimodal decoder meets every pair.

    Args:
        tokens_KT: token ids, begin and end included, padded on the right.
        step: captions that all images meet at once: memory grows with N * step * T * D.
    """
    _, image_tokens_NQD = model.encode_image(images_NCHW)
    keys_values = model.multimodal.image_keys_values(image_tokens_NQD)
    images, parts = len(images_NCHW), []
    for tokens_MT in tokens_KT.split(step):
        hidden_MTD = model.unimodal(tokens_MT)[1][:, :-1]
        hidden_NMTD = hidden_MTD.expand(images, -1, -1, -1)
        states = model.multimodal.decode(hidden_NMTD.flatten(0, 1), keys_values)
        target_MT = tokens_MT[:, 1:]
        target = target_MT.expand(images, -1, -1).flatten()
        losses = torch.cat(
            [
                _cross_entropy(model, some_PD, some_P)
                for some_PD, some_P in zip(states.flatten(0, 1).split(_ROWS), target.split(_ROWS), strict=True)
            ]
        )
        parts.append(-losses.view(images, len(tokens_MT), -1).sum(dim=2))
    return torch.cat(parts, dim=1)


def _cross_entropy(model: CoCa, states_PD: Tensor, target_P: Tensor) -> Tensor:
    """Of each position, 0 where the target is padding."""
    logits_PV = model.logits(states_PD)
    logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    return F.cross_entropy(logits_PV, target_P, ignore_index=model.config.text.pad_id, reduction="none")
