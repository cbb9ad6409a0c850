"""Named architectures: a variant is a function that returns a whole model config.

The paper's sizes (Yu et al. 2022, table 1) have 64,000 entries, an untied head and one MLP per multimodal block: so its
parameter counts say. open_clip's are those of its published weights (its `model_configs/`).
"""

from collections.abc import Callable

from coca.config import ModelConfig, ResNetConfig, TextConfig, ViTConfig
from coca.errors import BadInput


def base() -> ModelConfig:
    """CoCa-Base: 383M parameters."""
    return ModelConfig()


def large() -> ModelConfig:
    """CoCa-Large: 787M parameters."""
    return ModelConfig(
        vision=ViTConfig(width=1024, layers=24, heads=16, mlp_width=4096),
        text=TextConfig(width=1024, heads=16, mlp_width=4096),
        pooler_heads=16,
    )


def giant() -> ModelConfig:
    """CoCa: 2.1B parameters."""
    return ModelConfig(
        vision=ViTConfig(width=1408, layers=40, heads=16, mlp_width=6144),
        text=TextConfig(width=1408, heads=16, mlp_width=5632, unimodal_layers=18, multimodal_layers=18),
        pooler_heads=16,
    )


def base_resnet50() -> ModelConfig:
    """CoCa-Base's decoders behind a ResNet-50, at 224 pixels: 49 tokens."""
    return ModelConfig(vision=ResNetConfig(), caption_queries=49)


def base_resnet101() -> ModelConfig:
    """CoCa-Base's decoders behind a ResNet-101, at 224 pixels: 49 tokens."""
    return ModelConfig(vision=ResNetConfig(blocks=(3, 4, 23, 3)), caption_queries=49)


def small() -> ModelConfig:
    """2M parameters for 48-pixel pictures: what `coca demo` trains."""
    return ModelConfig(
        vision=ViTConfig(image_size=48, patch_size=8, width=128, layers=4, heads=4, mlp_width=512),
        text=_small_text(),
        embed_dim=128,
        caption_queries=36,
        pooler_heads=4,
    )


def small_resnet() -> ModelConfig:
    """As `small`, behind a ResNet of three stages: 36 tokens."""
    return ModelConfig(
        vision=ResNetConfig(image_size=48, blocks=(1, 2, 2), width=24, groups=8, stem="small"),
        text=_small_text(),
        embed_dim=128,
        caption_queries=36,
        pooler_heads=4,
    )


def coca_vit_b_32() -> ModelConfig:
    """open_clip's coca_ViT-B-32: 253,560,065 parameters."""
    return _open_clip(ViTConfig(image_size=224, patch_size=32, **_CLIP_VIT), width=512, heads=8)


def coca_vit_l_14() -> ModelConfig:
    """open_clip's coca_ViT-L-14: 638,450,177 parameters."""
    large_vit = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096}
    return _open_clip(ViTConfig(image_size=224, patch_size=14, **(_CLIP_VIT | large_vit)), width=768, heads=12)


VARIANTS: dict[str, Callable[[], ModelConfig]] = {
    "base": base,
    "large": large,
    "giant": giant,
    "base_resnet50": base_resnet50,
    "base_resnet101": base_resnet101,
    "small": small,
    "small_resnet": small_resnet,
    "coca_ViT-B-32": coca_vit_b_32,
    "coca_ViT-L-14": coca_vit_l_14,
}


def variant(name: str) -> ModelConfig:
    """The config of a variant.

    Raises:
        BadInput: there is none of this name; those that exist are listed.
    """
    if name not in VARIANTS:
        raise BadInput(f"there is no variant {name!r}", f"Known are {', '.join(VARIANTS)}")
    return VARIANTS[name]()


_CLIP_VIT = {"class_token": True, "patch_bias": False, "pre_norm": True, "final_norm": False}


def _open_clip(vision: ViTConfig, width: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vision=vision,
        text=TextConfig(
            vocab_size=49_408,
            context_length=76,
            width=width,
            heads=heads,
            mlp_width=4 * width,
            begin_id=49_406,
            end_id=49_407,
            multimodal_block="open_clip",
            embedding_slot="open_clip",
        ),
        embed_dim=width,
        pooling="open_clip",
        pooler_heads=8,
    )


def _small_text() -> TextConfig:
    return TextConfig(
        vocab_size=512,
        context_length=32,
        width=128,
        heads=4,
        mlp_width=512,
        unimodal_layers=2,
        multimodal_layers=2,
    )
