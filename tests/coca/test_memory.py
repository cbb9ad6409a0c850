"""What the formula counts against what PyTorch keeps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from coca.config import ModelConfig
from coca.layers import Block, CrossBlock
from coca.memory import Precision, memory
from coca.model import CoCa
from coca.objective import Objective
from coca.train_config import LossConfig
from coca.variants import variant


def changed(config: ModelConfig, part: str | None = None, **fields: object) -> ModelConfig:
    if part is None:
        return config.model_copy(update=fields)
    return config.model_copy(update={part: getattr(config, part).model_copy(update=fields)})


def open_clip() -> ModelConfig:
    config = changed(variant("coca_ViT-B-32"), embed_dim=64, caption_queries=40, pooler_heads=4)
    config = changed(config, "vision", image_size=64, patch_size=8, layers=2, width=96, heads=4, mlp_width=384)
    sizes = {"width": 64, "heads": 4, "mlp_width": 256, "unimodal_layers": 2, "multimodal_layers": 3}
    return changed(config, "text", vocab_size=300, context_length=24, begin_id=1, end_id=2, **sizes)


CONFIGS = {
    "vit": variant("small"),
    "vit with all its options": changed(
        changed(variant("small"), pooling="parallel"), "vision", qk_norm=True, registers=4, class_token=True
    ),
    "open_clip": open_clip(),
    "resnet": variant("small_resnet"),
    "resnet, large stem": changed(variant("small_resnet"), "vision", stem="imagenet", image_size=96, blocks=(2, 2)),
}


@pytest.fixture
def norms_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast has it on a GPU; on a CPU it leaves norms as they are."""
    for name in ("layer_norm", "group_norm"):
        original: Callable[..., Tensor] = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *rest, _original=original: _original(x.float(), *rest))


class Kept:
    """Bytes of the different tensors kept for the backward pass, but for some."""

    def __init__(self, but: Iterable[Tensor]) -> None:
        self._but = {tensor.untyped_storage().data_ptr() for tensor in but}
        self._storages: dict[int, Any] = {}  # held, so that no memory is used twice

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._but:
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def batch_of(config: ModelConfig, size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, config.vision.image_size, config.vision.image_size)
    return images, torch.randint(3, config.text.vocab_size, (size, config.text.context_length))


def kept_by_step(model: CoCa, batch: int, precision: Precision) -> int:
    images, tokens = batch_of(model.config, batch)
    kept = Kept(model.parameters())
    with kept.counting(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = Objective(model, LossConfig())(images, tokens)
    return kept.bytes + gradient_of_states(losses.captioning)


def gradient_of_states(loss: Tensor) -> int:
    """Bytes of the gradient that the fused loss has at hand, which is no saved tensor."""
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "gradients"):
            return int(node.gradients[0].nbytes)
        waiting += [below for below, _ in getattr(node, "next_functions", ()) if below is not None]
    raise AssertionError("no fused loss in the graph")


def kept_by_largest_block(model: CoCa, batch: int, precision: Precision) -> int:
    """What a block keeps when it is computed again, beside its inputs, which were kept."""
    calls: list[tuple[Any, Tensor, Tensor | None]] = []
    blocks = [*model.vision.blocks, *model.unimodal.blocks, *model.multimodal.blocks]
    hooks = [
        block.register_forward_pre_hook(lambda block, inputs: calls.append((block, inputs[0], inputs[-1])))
        for block in blocks
    ]
    images, tokens = batch_of(model.config, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        image_tokens = model.encode_image(images)[1]
        model.multimodal(model.unimodal(tokens)[1][:, :-1], image_tokens)
        for hook in hooks:
            hook.remove()
        return max(kept_by_block(model, *call, image_tokens) for call in calls)


def kept_by_block(model: CoCa, block: nn.Module, x: Tensor, mask: Tensor | None, image_tokens: Tensor) -> int:
    kept = Kept([*model.parameters(), x, image_tokens])
    with kept.counting():
        if isinstance(block, CrossBlock):
            block(x, block.keys_values(image_tokens))
        elif isinstance(block, Block):
            block(x, None if mask is x else mask)
        else:
            block(x)
    return kept.bytes


def difference(kept: dict[int, int]) -> float:
    """Bytes of one more sample, without what does not grow with the batch."""
    (few, least), (many, most) = kept.items()
    return (most - least) / (many - few)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("norms_in_float32")
def test_activations_are_what_is_kept(name: str, precision: Precision) -> None:
    model = CoCa(CONFIGS[name])
    expected = memory(model.config, 1, precision, checkpointing=False)
    kept = {batch: kept_by_step(model, batch, precision) for batch in (2, 10)}
    of_one = difference(kept)
    assert of_one == pytest.approx(expected.activations, rel=0.015)
    # The rest is there once per batch: copies of the weights, and open_clip's queries.
    assert kept[2] - 2 * of_one == pytest.approx(expected.weight_copies, rel=0.02, abs=25_000)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("norms_in_float32")
def test_checkpointing_keeps_the_blocks_inputs_and_one_block(name: str, precision: Precision) -> None:
    model = CoCa(CONFIGS[name])
    largest = difference({batch: kept_by_largest_block(model, batch, precision) for batch in (2, 10)})
    model.checkpoint_activations()
    kept = difference({batch: kept_by_step(model, batch, precision) for batch in (2, 10)})
    expected = memory(model.config, 1, precision, checkpointing=True).activations
    assert kept + largest == pytest.approx(expected, rel=0.01, abs=10_000)  # features, token ids, masks


def test_state_is_that_of_adamw() -> None:
    model = CoCa(variant("small"))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    expected = memory(model.config, 7, "float32", checkpointing=False)
    assert expected.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert expected.gradients == sum(
        parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None
    )
    assert expected.optimizer == sum(moment.nbytes for moment in moments)
    assert expected.weight_copies == 0
    assert expected.total == sum(expected)


def test_activations_grow_with_the_batch_and_with_the_captions() -> None:
    one, eight = (memory(variant("base"), batch, "bfloat16", checkpointing=False) for batch in (1, 8))
    assert eight.activations == 8 * one.activations
    assert eight[:-1] == one[:-1]
    short = memory(variant("base"), 1, "bfloat16", checkpointing=False, tokens=32)
    assert short.activations < one.activations
