"""What captions have to begin with.

Shapes: B images, P prompt tokens, T tokens up to the longest caption.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from coca.errors import BadInput


class Prompts(NamedTuple):
    """Prompts at the left of rows as long as the longest caption, padded behind."""

    tokens_BT: Tensor
    forced_BT: Tensor  # True where the prompt decides
    shortest: int
    pad_id: int


def read_prompts(
    prompts_BP: Tensor | None, batch: int, max_length: int, begin_id: int, pad_id: int, device: torch.device
) -> Prompts:
    """Prompts as given, or the begin token alone.

    Raises:
        BadInput: another number of rows than images, padding within a prompt, an empty prompt, or one that leaves no
            room for a token.
    """
    if prompts_BP is None:
        prompts_BP = torch.full((batch, 1), begin_id)
    prompts_BP = prompts_BP.to(device)
    rows, longest = prompts_BP.shape
    if batch == 0:
        raise BadInput("there are no images to caption", "Give at least one")
    if rows != batch:
        raise BadInput(f"{rows} prompts for {batch} images", "Give as many prompts as images")
    lengths_B = ((prompts_BP != pad_id) * torch.arange(1, longest + 1, device=device)).amax(dim=1)
    shortest, filled = int(lengths_B.min()), int(lengths_B.max())
    if not torch.equal(lengths_B, (prompts_BP != pad_id).sum(dim=1)):
        raise BadInput(f"a prompt holds the padding token {pad_id} before its end", "Leave it out: it ends a caption")
    if shortest == 0:
        raise BadInput("a prompt is empty", "Begin every prompt with the begin token")
    if filled >= max_length:
        raise BadInput(
            f"a prompt of {filled} tokens leaves no room in captions of {max_length}", "Shorten it, or raise max_length"
        )
    tokens_BT = prompts_BP.new_full((batch, max_length), pad_id)
    tokens_BT[:, :filled] = prompts_BP[:, :filled]
    forced_BT = torch.arange(max_length, device=device) < lengths_B[:, None]
    return Prompts(tokens_BT, forced_BT, shortest, pad_id)
