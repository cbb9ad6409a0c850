"""CoCa (Yu et al. 2022, arXiv 2205.01917): contrastive captioner.

Shapes: B batch, C channels, H height, W width, K patches kept, S tokens of the image encoder, Q image tokens of the
decoder, D width, T text tokens, V vocabulary, E embedding.

From here an image goes through ``vision.py`` (or ``resnet.py``) and a pooler of ``layers.py``, a caption through
``text.py``; both end in ``losses.py``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from coca.config import ModelConfig
from coca.layers import AttentionalPooler
from coca.packed import Linear
from coca.resnet import ResNet
from coca.text import MultimodalDecoder, UnimodalDecoder
from coca.vision import VisionTransformer

MAX_LOGIT_SCALE = 100.0  # as CLIP (Radford et al. 2021, section 2.5) clips it


class Output(NamedTuple):
    """What one pass gives: both embeddings at unit length, caption logits, and the inverse temperature."""

    image_features: Tensor  # B, E
    text_features: Tensor  # B, E
    logits: Tensor  # B, T-1, V: position t predicts token t+1
    logit_scale: Tensor  # scalar


class States(NamedTuple):
    """What both losses need: as ``Output``, but before the head, whose logits the fused loss never holds at once."""

    image_features_BE: Tensor
    text_features_BE: Tensor
    hidden_BTD: Tensor  # B, T-1, D


class CoCa(nn.Module):
    """An image encoder, attentional poolers, a unimodal and a multimodal text decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        text, source_width = config.text, config.vision.output_width
        self.vision = ResNet(config.vision) if config.vision.kind == "resnet" else VisionTransformer(config.vision)
        self.caption_pooler = AttentionalPooler(
            text.width,
            source_width,
            config.pooler_heads,
            config.caption_queries,
            open_clip=config.pooling == "open_clip",
        )
        self.contrastive_pooler: AttentionalPooler | None = None
        if config.pooling != "open_clip":
            pooled_width = text.width if config.pooling == "cascade" else source_width
            self.contrastive_pooler = AttentionalPooler(
                text.width, pooled_width, config.pooler_heads, 1, open_clip=False
            )
        self.unimodal = UnimodalDecoder(text)
        self.multimodal = MultimodalDecoder(text)
        self.image_projection = Linear(text.width, config.embed_dim, bias=False) if config.embed_dim else None
        self.text_projection = Linear(text.width, config.embed_dim, bias=False) if config.embed_dim else None
        self.log_logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(())) if config.initial_logit_bias is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter.

        Weights have variance 1 / fan-in (LeCun et al. 1998), so that attention is not uniform at the start and the
        poolers' queries tell patches apart from the first step; what a block adds to the residual stream is scaled by
        depth (Radford et al. 2019, section 2.3), in a ResNet it starts at nothing (Goyal et al. 2017, section 5.1).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("residual_norm.weight"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("queries_QD"):
                nn.init.normal_(parameter)
            elif name.endswith(("positions_SD", "class_token_D", "registers_RD")):
                nn.init.normal_(parameter, std=0.7)  # as loud as the patches, whose pixels run from -1 to 1
            elif name.endswith(("positions_TD", "embedding_token_D", "token_embedding.weight")):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=parameter[0].numel() ** -0.5)
        for stack in (self.vision.blocks, self.unimodal.blocks, self.multimodal.blocks):
            for name, parameter in stack.named_parameters():
                if name.endswith(("out.weight", "contract.weight")):
                    parameter.data.div_(math.sqrt(2 * len(stack)))
        nn.init.constant_(self.log_logit_scale, math.log(1 / self.config.initial_temperature))
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.config.initial_logit_bias or 0.0)

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature."""
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Hold the inverse temperature in 1 to 100; to be called after each optimizer step.

        A clamp in the forward pass would have no gradient beyond its bound, and the parameter could not come back.
        """
        self.log_logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    @property
    def head_VD(self) -> Tensor:  # noqa: N802
        """The matrix that turns the multimodal decoder's states into logits."""
        head = self.multimodal.head
        return self.unimodal.token_embedding.weight if head is None else head.weight

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Whether training keeps only the input of each block, and computes what is inside again."""
        for stack in (self.vision, self.unimodal, self.multimodal):
            stack.checkpoint_activations = enabled

    def encode_image(self, images_BCHW: Tensor, kept_patches_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(image_features_BE at unit length, image_tokens_BQD for the multimodal decoder)."""
        encoded_BSD = self.vision(images_BCHW, kept_patches_BK)
        image_tokens_BQD = self.caption_pooler(encoded_BSD)
        if self.contrastive_pooler is None:
            pooled_BD, image_tokens_BQD = image_tokens_BQD[:, 0], image_tokens_BQD[:, 1:]
        else:
            source = image_tokens_BQD if self.config.pooling == "cascade" else encoded_BSD
            pooled_BD = self.contrastive_pooler(source)[:, 0]
        return _embed(pooled_BD, self.image_projection), image_tokens_BQD

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Token ids, begin and end included, padded on the right, to text_features_BE at unit length."""
        return _embed(self.unimodal(tokens_BT)[0], self.text_projection)

    def states(self, images_BCHW: Tensor, tokens_BT: Tensor, kept_patches_BK: Tensor | None = None) -> States:
        """One pass over pictures and their captions, up to the head."""
        image_features_BE, image_tokens_BQD = self.encode_image(images_BCHW, kept_patches_BK)
        embedding_BD, hidden_BTD = self.unimodal(tokens_BT)
        # The last position has nothing left to predict.
        hidden_BTD = self.multimodal(hidden_BTD[:, :-1], image_tokens_BQD)
        return States(image_features_BE, _embed(embedding_BD, self.text_projection), hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of the multimodal decoder's states."""
        head = self.multimodal.head
        return F.linear(hidden_BTD, self.head_VD) if head is None else head(hidden_BTD)

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor) -> Output:
        """
        Args:
            images_BCHW: normalised pixels.
            tokens_BT: token ids, begin and end included, padded on the right.
        """
        states = self.states(images_BCHW, tokens_BT)
        logits_BTV = self.logits(states.hidden_BTD)
        return Output(states.image_features_BE, states.text_features_BE, logits_BTV, self.logit_scale)


def _embed(pooled_BD: Tensor, projection: nn.Linear | None) -> Tensor:
    return F.normalize(pooled_BD if projection is None else projection(pooled_BD), dim=-1)
