"""Small runs to save and restore, told apart by their step."""

import torch
from torch import Tensor

from coca.checkpoint import PlainParts
from coca.checkpoint_saver import CheckpointSaver
from coca.config import ModelConfig, Preprocessing, TextConfig, ViTConfig
from coca.model import CoCa
from coca.run_folder import RunFolder
from coca.training_state import TrainingState

CONFIG = ModelConfig(
    vision=ViTConfig(image_size=16, patch_size=8, width=8, layers=1, heads=2, mlp_width=8),
    text=TextConfig(
        vocab_size=32, context_length=8, width=8, heads=2, mlp_width=8, unimodal_layers=1, multimodal_layers=1
    ),
    embed_dim=4,
    caption_queries=2,
    pooler_heads=2,
)


def tensors_at(step: int) -> dict[str, Tensor]:
    """What a small run holds at a step."""
    random = torch.Generator().manual_seed(step)
    return {
        "model/matrix": torch.rand(6, 5, generator=random),
        "model/scale": torch.rand((), generator=random),
        "optimizer/matrix/mean": torch.rand(6, 5, generator=random),
        "optimizer/matrix/step": torch.tensor(float(step)),
        "rng/torch": random.get_state(),
    }


def state_at(step: int, tensors: dict[str, Tensor] | None = None) -> TrainingState:
    held = tensors_at(step) if tensors is None else tensors
    return TrainingState(step, held, fixed={"seed": 7, "loss.captioning_weight": 2.0}, counters={"skipped": step})


def plain_at(step: int) -> PlainParts:
    torch.manual_seed(step)
    weights = CoCa(CONFIG).state_dict()
    return PlainParts(weights, CONFIG, None, Preprocessing(image_size=16), {"dataset": "here"}, step)


def save_steps(run: RunFolder, *steps: int, keep: int = 3) -> None:
    """Save each step in turn."""
    with CheckpointSaver(run, keep=keep) as saver:
        for step in steps:
            saver.save(state_at(step), plain_at(step))


def equals_step(tensors: dict[str, Tensor], step: int) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_at(step).items())


def empty_tensors() -> dict[str, Tensor]:
    """To restore into: like those of a step, of another content."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_at(0).items()}
