"""A tiny random checkpoint, whose weights are large enough that captions and embeddings depend on the input."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coca.checkpoint import save_checkpoint
from coca.config import ModelConfig, Preprocessing, TextConfig, ViTConfig
from coca.model import CoCa
from coca.storage import Store
from coca.tokenizer import train_bpe

EMBED_DIM = 24
CONTEXT_LENGTH = 12


def encode_image(seed: int, side: int = 40, format: str = "png") -> bytes:
    """A picture of random blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(buffer, format)
    return buffer.getvalue()


def data_uri(image: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    """Twelve sound images in three formats."""
    return [encode_image(seed, format=("png", "jpeg", "webp")[seed % 3]) for seed in range(12)]


@pytest.fixture(scope="session")
def to_data_uri() -> Callable[..., str]:
    return data_uri


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = train_bpe(["a red circle", "a blue square left of a green star"], vocab_size=300)
    config = ModelConfig(
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=CONTEXT_LENGTH,
            width=16,
            heads=2,
            mlp_width=32,
            unimodal_layers=1,
            multimodal_layers=1,
        ),
        embed_dim=EMBED_DIM,
        caption_queries=4,
        pooler_heads=2,
    )
    torch.manual_seed(0)
    model = CoCa(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    folder: Path = tmp_path_factory.mktemp("serving")
    save_checkpoint(
        Store(folder),
        "checkpoint",
        model=model,
        tokenizer=tokenizer,
        preprocessing=Preprocessing(image_size=16),
        step=7,
        provenance={},
    )
    return str(folder / "checkpoint")
