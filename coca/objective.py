"""What training minimises: a model and its two losses in one forward pass.

A module, so that whatever wraps a model for many devices wraps all of the pass, also the head inside the captioning
loss.

Shapes: B batch, C channels, H height, W width, T tokens, K patches kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from coca.losses import caption_ids, contrastive_loss, fused_captioning_loss, sigmoid_loss
from coca.model import CoCa
from coca.train_config import LossConfig


class Losses(NamedTuple):
    """Both losses, each scaled so that their average over ranks is that of the global batch."""

    contrastive: Tensor
    captioning: Tensor


class Objective(nn.Module):
    """``forward`` gives both losses of this rank's share of the global batch, not yet weighted."""

    def __init__(self, model: CoCa, config: LossConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self._config = config
        # The losses run tile by tile and speak to other ranks: the model alone is one graph.
        self._states = torch.compile(model.states, fullgraph=True) if compiled else model.states

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor, kept_patches_BK: Tensor | None = None) -> Losses:
        states = self._states(images_BCHW, tokens_BT, kept_patches_BK)
        return Losses(
            self._contrastive(states.image_features_BE, states.text_features_BE, tokens_BT),
            fused_captioning_loss(
                states.hidden_BTD,
                self.model.head_VD,
                tokens_BT,
                self.model.config.text.pad_id,
                label_smoothing=self._config.label_smoothing,
            ),
        )

    def _contrastive(self, image_features_BE: Tensor, text_features_BE: Tensor, tokens_BT: Tensor) -> Tensor:
        ignored = self._config.repeated_captions == "ignored"
        ids_B = caption_ids(tokens_BT, self.model.config.text.pad_id) if ignored else None
        scale = self.model.logit_scale
        if self._config.contrastive == "sigmoid":
            assert self.model.logit_bias is not None
            return sigmoid_loss(image_features_BE, text_features_BE, scale, self.model.logit_bias, caption_ids_N=ids_B)
        return contrastive_loss(image_features_BE, text_features_BE, scale, caption_ids_N=ids_B)
