"""CoCa (Yu et al. 2022, arXiv 2205.01917): contrastive captioner.

Shapes: B batch, C channels, H height, W width, Q caption queries, D vision width, T tokens, V vocabulary, E embedding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from coca.config import ModelConfig
from coca.layers import AttentionalPooler
from coca.text import MultimodalDecoder, UnimodalDecoder
from coca.vision import VisionTransformer

MAX_LOGIT_SCALE = 100.0  # as CLIP (Radford et al. 2021, section 2.5) clips it


class Output(NamedTuple):
    """What one pass gives: both embeddings at unit length, caption logits, and the inverse temperature."""

    image_features: Tensor  # B, E
    text_features: Tensor  # B, E
    logits: Tensor  # B, T-1, V: position t predicts token t+1
    logit_scale: Tensor  # scalar


class CoCa(nn.Module):
    """An image encoder, a captioning pooler and behind it a contrastive one, a unimodal and a multimodal decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.vision = VisionTransformer(vision)
        self.caption_pooler = AttentionalPooler(vision.width, config.pooler_heads, config.caption_queries)
        self.contrastive_pooler = AttentionalPooler(vision.width, config.pooler_heads, 1)
        self.image_projection = nn.Linear(vision.width, config.embed_dim, bias=False)
        self.unimodal = UnimodalDecoder(config.text)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.multimodal = MultimodalDecoder(config.text, vision.width)
        self.log_logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter.

        Weights have variance 1 / fan-in (LeCun et al. 1998), so that attention is not uniform at the start and the
        poolers' queries tell patches apart from the first step; what a block adds to the residual stream is scaled by
        depth (Radford et al. 2019, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("queries_QD"):
                nn.init.normal_(parameter)
            elif name.endswith("positions_SD"):
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

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, at most 100."""
        return self.log_logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def encode_image(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(image_features_BE at unit length, image_tokens_BQD for the multimodal decoder).

        Cascade: the contrastive pooler reads what the captioning pooler gives.
        """
        image_tokens_BQD = self.caption_pooler(self.vision(images_BCHW))
        pooled_BD = self.contrastive_pooler(image_tokens_BQD)[:, 0]
        return F.normalize(self.image_projection(pooled_BD), dim=-1), image_tokens_BQD

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Token ids, begin and end included, padded on the right, to text_features_BE at unit length."""
        embedding_BD, _ = self.unimodal(tokens_BT)
        return F.normalize(self.text_projection(embedding_BD), dim=-1)

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor) -> Output:
        image_features_BE, image_tokens_BQD = self.encode_image(images_BCHW)
        embedding_BD, hidden_BTD = self.unimodal(tokens_BT)
        text_features_BE = F.normalize(self.text_projection(embedding_BD), dim=-1)
        # The last position has nothing left to predict.
        logits_BTV = self.multimodal(hidden_BTD[:, :-1], self.multimodal.image_keys_values(image_tokens_BQD))
        return Output(image_features_BE, text_features_BE, logits_BTV, self.logit_scale)
