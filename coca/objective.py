"""What training minimises: a model and its two losses in one forward pass.

A module, so that whatever wraps a model for many devices wraps all of the pass, also the head inside the captioning
loss.

Shapes: B batch, C channels, H height, W width, T tokens, K patches kept, E embedding.
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


class Features(NamedTuple):
    """What the contrastive loss compares, at unit length."""

    images_BE: Tensor
    texts_BE: Tensor


class Cached(NamedTuple):
    """What a micro-batch has to know of the whole batch (``coca.accumulate``)."""

    features: Features
    """Gradients of the contrastive loss over the global batch by the features of this micro-batch."""
    scalars: tuple[Tensor, ...]
    """The micro-batch's share of those by ``Objective.scalars``."""
    targets: Tensor
    """``real_targets`` of the whole batch."""


class Objective(nn.Module):
    """``forward`` gives both losses of this rank's share of the global batch, not yet weighted."""

    def __init__(self, model: CoCa, config: LossConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.compiled = compiled
        self._config = config
        self._states, self._encode = model.states, self._encode_both
        if compiled:
            # The losses run tile by tile and speak to other ranks: the model alone is one graph.
            self._states = torch.compile(self._states, fullgraph=True)
            self._encode = torch.compile(self._encode, fullgraph=True)

    def compile_blocks(self) -> None:
        """Compile each transformer or residual block by itself and nothing between them, where FSDP has its hooks."""
        self._states, self._encode = self.model.states, self._encode_both
        for stack in (self.model.vision, self.model.unimodal, self.model.multimodal):
            for block in stack.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True)

    @property
    def scalars(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the contrastive loss has beside the features: the temperature and the sigmoid's bias."""
        bias = self.model.logit_bias if self._config.contrastive == "sigmoid" else None
        return (self.model.log_logit_scale,) if bias is None else (self.model.log_logit_scale, bias)

    def forward(
        self,
        images_BCHW: Tensor,
        tokens_BT: Tensor,
        kept_patches_BK: Tensor | None = None,
        cached: Cached | None = None,
    ) -> Losses:
        """With ``cached`` the batch is a part of a larger one. Then captioning is its share of the captioning loss, and
        contrastive is a stand-in that has the gradient of the contrastive loss over the whole, but not its value."""
        states = self._states(images_BCHW, tokens_BT, kept_patches_BK)
        features = Features(states.image_features_BE, states.text_features_BE)
        return Losses(
            self.contrastive(features, tokens_BT) if cached is None else self._stand_in(features, cached),
            fused_captioning_loss(
                states.hidden_BTD,
                self.model.head_VD,
                tokens_BT,
                self.model.config.text.pad_id,
                label_smoothing=self._config.label_smoothing,
                targets=None if cached is None else cached.targets,
            ),
        )

    def features(self, images_BCHW: Tensor, tokens_BT: Tensor, kept_patches_BK: Tensor | None = None) -> Features:
        """Of the encoders alone, in float32 also under autocast."""
        features = self._encode(images_BCHW, tokens_BT, kept_patches_BK)
        return Features(*(_at_least_float32(value) for value in features))

    def contrastive(self, features: Features, tokens_BT: Tensor) -> Tensor:
        """The contrastive loss of this rank's rows against the global batch."""
        ignored = self._config.repeated_captions == "ignored"
        ids_B = caption_ids(tokens_BT, self.model.config.text.pad_id) if ignored else None
        scale = self.model.logit_scale
        if self._config.contrastive == "sigmoid":
            assert self.model.logit_bias is not None
            return sigmoid_loss(*features, scale, self.model.logit_bias, caption_ids_N=ids_B)
        return contrastive_loss(*features, scale, caption_ids_N=ids_B)

    def _encode_both(self, images_BCHW: Tensor, tokens_BT: Tensor, kept_patches_BK: Tensor | None) -> Features:
        return Features(self.model.encode_image(images_BCHW, kept_patches_BK)[0], self.model.encode_text(tokens_BT))

    def _stand_in(self, features: Features, cached: Cached) -> Tensor:
        values, gradients = (*features, *self.scalars), (*cached.features, *cached.scalars)
        products = [_at_least_float32(value) * gradient for value, gradient in zip(values, gradients, strict=True)]
        return torch.stack([product.sum() for product in products]).sum()


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
