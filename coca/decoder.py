"""Both text decoders in the middle of captions, with what they have seen cached.

Shapes: I images, R rows (one caption each, as many for every image), Q image tokens, T new positions, L positions of
the caches, D width, V vocabulary.
"""

from functools import cache

import torch
from torch import Tensor

from coca.layers import KeysValues, KeyValueCache
from coca.model import CoCa

_COMPILED_SHAPES = 64  # batch sizes and lengths, of all models together, before torch.compile gives up


class Decoder:
    """Keys and values of the images, computed once, and of the tokens so far; gives the logits of the next token.

    With ``compiled`` the step of one token is a graph of fixed shapes, compiled once for each batch size and length;
    rows cannot be dropped then.
    """

    def __init__(
        self,
        model: CoCa,
        image_tokens_IQD: Tensor,
        *,
        max_length: int,
        compiled: bool = False,
    ) -> None:
        self._model, self.static = model, compiled
        text, rows = model.config.text, len(image_tokens_IQD)
        # As they come from one projection, keys and values lie interleaved: apart they are read faster at every step.
        self._image_keys_values = [
            (keys.contiguous(), values.contiguous())
            for keys, values in model.multimodal.image_keys_values(image_tokens_IQD)
        ]

        def caches(layers: int, heads: int) -> list[KeyValueCache]:
            like = self._image_keys_values[0][0]
            return [KeyValueCache(rows, heads, max_length, text.width // heads, like) for _ in range(layers)]

        self._unimodal = caches(text.unimodal_layers, text.heads)
        self._multimodal = caches(text.multimodal_layers, text.decoder_heads)
        self._max_length = max_length

    def step(self, tokens_RT: Tensor) -> Tensor:
        """Logits (R, V) of the token after these, which continue those of earlier calls.

        The first call may bring any number of positions, later ones bring one.
        """
        caches = (self._unimodal, self._multimodal)
        length = self._unimodal[0].length
        if not self.static or not length:
            return _step(self._model, tokens_RT, self._image_keys_values, *caches, None)
        if isinstance(length, int):
            length = torch.tensor([length], device=tokens_RT.device)
            for each in (*self._unimodal, *self._multimodal):
                each.length = length
        seen_111L = (torch.arange(self._max_length, device=tokens_RT.device) <= length)[None, None, None]
        with torch._dynamo.config.patch(recompile_limit=_COMPILED_SHAPES):
            logits_RV = _compiled_step()(self._model, tokens_RT, self._image_keys_values, *caches, seen_111L)
        length += 1  # in place: every cache shares it
        return logits_RV

    def select(self, rows_R: Tensor, images_I: Tensor | None = None) -> None:
        """Go on with these rows in this order, and these images, where any has left.

        Each image has as many rows, side by side.
        """
        for each in (*self._unimodal, *self._multimodal):
            each.select(rows_R)
        if images_I is not None:
            self._image_keys_values = [(keys[images_I], values[images_I]) for keys, values in self._image_keys_values]


def _step(
    model: CoCa,
    tokens_RT: Tensor,
    image_keys_values: list[KeysValues],
    unimodal: list[KeyValueCache],
    multimodal: list[KeyValueCache],
    mask: Tensor | None,
) -> Tensor:
    hidden_RTD = model.unimodal.decode(tokens_RT, unimodal, mask)
    hidden_RTD = model.multimodal.decode(hidden_RTD, image_keys_values, multimodal, mask)
    logits_RV = model.logits(hidden_RTD[:, -1])
    # Draws and scores are sums over the vocabulary and over tokens: half precision is too coarse for them.
    return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


@cache
def _compiled_step():  # type: ignore[no-untyped-def]
    return torch.compile(_step, fullgraph=True, dynamic=False)
