"""Captions from images: greedy, sampled or searched with beams.

Shapes: B images, C channels, H height, W width, P prompt tokens, T tokens, V vocabulary, E embedding, R rows still
being written.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coca.beam_search import beam_search
from coca.config import GenerationConfig
from coca.decoder import Decoder
from coca.errors import BadInput
from coca.logits import adjust_logits, sample
from coca.model import CoCa
from coca.packed import packed
from coca.prompts import Prompts, read_prompts
from coca.typed_config import build_config


class Generation(NamedTuple):
    """Captions with begin and end, padded after the end, what the model thought of them, and both embeddings."""

    tokens_BT: Tensor
    log_probs_BT: Tensor  # of each token, as the model gives it before any option changes it; 0 at prompts and padding
    image_features_BE: Tensor  # unit length
    text_features_BE: Tensor  # unit length, of the captions


@torch.inference_mode()
def generate(
    model: CoCa,
    images_BCHW: Tensor,
    *,
    prompts_BP: Tensor | None = None,
    begin_id: int | None = None,
    end_id: int | None = None,
    pad_id: int | None = None,
    compiled: bool = False,
    **options: Any,
) -> Generation:
    """Write one caption for each image.

    The image is encoded once, and its keys and values for the decoder are computed once, whatever the number of beams;
    each step runs one position on cached keys and values. A caption that has ended leaves the work; choosing padding
    ends it as well.

    Args:
        images_BCHW: normalised pixels.
        prompts_BP: token ids that the captions begin with, the begin token included, padded on the right; rows may
            differ in length. By default the begin token alone.
        begin_id, end_id, pad_id: instead of the model's own.
        compiled: run the steps as one graph of fixed shapes with torch.compile; greedy and sampling only.
        options: fields of ``GenerationConfig``, such as ``beams=6`` or ``temperature=0.7, top_p=0.9``.

    Raises:
        BadInput: an option that does not exist or breaks its rule, or prompts that do not fit.
    """
    config = build_config(GenerationConfig, options)
    if compiled and config.beams > 1:
        raise BadInput("compiled = True and beams > 1: beams change their order", "Leave one of the two away")
    text = model.config.text
    special = {"begin_id": begin_id, "end_id": end_id, "pad_id": pad_id}
    begin, end, pad = (getattr(text, name) if given is None else given for name, given in special.items())
    max_length = min(config.max_length or text.context_length, text.context_length)
    if config.min_length > max_length:
        raise BadInput(f"min_length = {config.min_length} is above {max_length}, the longest caption", "Lower it")
    prompts = read_prompts(prompts_BP, len(images_BCHW), max_length, begin, pad, images_BCHW.device)

    image_features_BE, image_tokens_BQD = model.encode_image(images_BCHW)
    search = _write if config.beams == 1 else beam_search
    worth_packing = max_length - prompts.shortest > 8 and not compiled
    with packed(model.unimodal, model.multimodal) if worth_packing else nullcontext():
        decoder = Decoder(model, image_tokens_BQD, max_length=max_length, compiled=compiled)
        tokens_BT, log_probs_BT = search(decoder, prompts, config, end)
        captions_BT = tokens_BT if pad == text.pad_id else tokens_BT.masked_fill(tokens_BT == pad, text.pad_id)
        text_features_BE = model.encode_text(captions_BT)
    return Generation(tokens_BT, log_probs_BT, image_features_BE, text_features_BE)


def _write(decoder: Decoder, prompts: Prompts, config: GenerationConfig, end_id: int) -> tuple[Tensor, Tensor]:
    """Greedy or sampled: (tokens_BT, log_probs_BT)."""
    tokens_BT, pad_id = prompts.tokens_BT.clone(), prompts.pad_id
    batch, max_length = tokens_BT.shape
    device = tokens_BT.device
    length = prompts.shortest
    logits_RV = decoder.step(tokens_BT[:, :length])
    log_probs_BT = logits_RV.new_zeros(batch, max_length)
    uniform_BT = _draws(batch, max_length, config.seed).to(logits_RV) if config.temperature else None
    rows_R = torch.arange(batch, device=device)
    finished_R = torch.zeros(batch, dtype=torch.bool, device=device)
    while True:
        adjusted_RV = adjust_logits(logits_RV, tokens_BT[rows_R, :length], config, end_id)
        if uniform_BT is None:
            next_R = adjusted_RV.argmax(dim=1)
        else:
            next_R = sample(adjusted_RV, uniform_BT[rows_R, length], config)
        if config.force_end and length + 1 == max_length:
            next_R = torch.full_like(next_R, end_id)
        forced_R = prompts.forced_BT[rows_R, length]
        next_R = torch.where(forced_R, prompts.tokens_BT[rows_R, length], next_R).masked_fill(finished_R, pad_id)
        chosen_R = logits_RV.gather(1, next_R[:, None])[:, 0] - logits_RV.logsumexp(dim=1)
        log_probs_BT[rows_R, length] = chosen_R.masked_fill(forced_R | finished_R, 0)
        tokens_BT[rows_R, length] = next_R
        length += 1
        finished_R = finished_R | (((next_R == end_id) | (next_R == pad_id)) & ~forced_R)
        if length == max_length or bool(finished_R.all()):
            return tokens_BT[:, :length], log_probs_BT[:, :length]
        if not decoder.static and bool(finished_R.any()):
            going_on = (~finished_R).nonzero()[:, 0]
            decoder.select(going_on, going_on)
            rows_R, next_R, finished_R = rows_R[going_on], next_R[going_on], finished_R[going_on]
        logits_RV = decoder.step(next_R[:, None])


def _draws(rows: int, length: int, seed: int) -> Tensor:
    """Uniform numbers for each row and position; a row's depend on the seed and its place in the batch alone."""
    generators = (torch.Generator().manual_seed((seed << 20) + row) for row in range(rows))
    return torch.stack([torch.rand(length, generator=generator, dtype=torch.float64) for generator in generators])
