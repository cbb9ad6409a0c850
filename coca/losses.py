"""The losses of CoCa and SigLIP. Averaged over ranks (as DDP averages gradients), each gives what one process with the
whole batch would: so a rank's feature gradients carry a factor of the number of ranks.

No loss here holds a matrix of all pairs, nor all logits over the vocabulary (but for the plain ``captioning_loss``):
both are computed a tile at a time, and again where the gradient needs them. Sums are kept in float32, and in float64
for float64 inputs, whatever autocast says.

Shapes: N local rows, G global rows, E embedding, R by C a tile of the N by G matrix, T positions, V vocabulary,
D width of the decoder, P = N (T - 1) predicted positions, K of them in a chunk; 1 is a dimension of size 1.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from coca.distributed import gather_rows, max_over_ranks, rank, reduce_to_owner, sum_over_ranks, world_size


def contrastive_loss(
    image_features_NE: Tensor,
    text_features_NE: Tensor,
    logit_scale: Tensor,
    *,
    caption_ids_N: Tensor | None = None,
    tile: int = 2048,
) -> Tensor:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3), in nats.

    The mean of both directions, as CLIP has it (CoCa's formula adds them): identical embeddings give ln G.

    Args:
        image_features_NE, text_features_NE: unit length, row i of one belongs to row i of the other; ranks hold equally
            many rows.
        logit_scale: scalar, the inverse temperature.
        caption_ids_N: ``caption_ids`` of the texts; pairs of different rows with equal captions are then left out of
            both denominators.
        tile: rows and columns of the matrix that are held at a time.
    """
    ids_G = None if caption_ids_N is None else gather_rows(caption_ids_N)
    loss: Tensor = _Softmax.apply(image_features_NE, text_features_NE, logit_scale, ids_G, tile)
    return loss


def sigmoid_loss(
    image_features_NE: Tensor,
    text_features_NE: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    caption_ids_N: Tensor | None = None,
    tile: int = 2048,
) -> Tensor:
    """SigLIP's loss over the global batch (Zhai et al. 2023, arXiv 2303.15343, algorithm 1), in nats for each row.

    Every pair is a decision of its own: -1/G sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), with z = 1 where i = j
    and -1 elsewhere.

    Args:
        image_features_NE, text_features_NE, caption_ids_N, tile: as for ``contrastive_loss``; pairs of different rows
            with equal captions are left out of the sum.
        logit_scale, logit_bias: scalars; the paper starts from 10 and -10.
    """
    ids_G = None if caption_ids_N is None else gather_rows(caption_ids_N)
    loss: Tensor = _Sigmoid.apply(image_features_NE, text_features_NE, logit_scale, logit_bias, ids_G, tile)
    return loss


def caption_ids(tokens_NT: Tensor, pad_id: int) -> Tensor:
    """A 64-bit hash of each row's real tokens, (N,) int64: the same on every machine and however wide the padding.

    A polynomial modulo 2^64 over the tokens, with splitmix64 (Steele et al. 2014, doi 10.1145/2714064.2660195) applied
    to each token before and to the sum after.
    """
    powers_T = torch.full_like(tokens_NT[0], _signed(0xD1342543DE82EF95), dtype=torch.int64).cumprod(0)
    terms_NT = _mixed(tokens_NT.long()) * powers_T
    return _mixed(terms_NT.masked_fill(tokens_NT == pad_id, 0).sum(1))


def captioning_loss(logits_NTV: Tensor, tokens_NT: Tensor, pad_id: int, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the next token, averaged over the real tokens of the global batch, in nats.

    Args:
        logits_NTV: position t predicts token t + 1; T - 1 positions.
        tokens_NT: padded on the right with ``pad_id``.
        label_smoothing: share of the target spread evenly over the vocabulary, as in ``F.cross_entropy``.
    """
    target_P = tokens_NT[:, 1:].flatten()
    total = F.cross_entropy(
        logits_NTV.flatten(0, 1), target_P, ignore_index=pad_id, reduction="sum", label_smoothing=label_smoothing
    )
    return total * world_size() / real_targets(tokens_NT, pad_id)


def real_targets(tokens_NT: Tensor, pad_id: int) -> Tensor:
    """Tokens of the global batch that have to be predicted, at least 1: what the captioning losses average over."""
    return sum_over_ranks((tokens_NT[:, 1:] != pad_id).sum()).clamp(min=1)


def fused_captioning_loss(
    hidden_NTD: Tensor,
    head_VD: Tensor,
    tokens_NT: Tensor,
    pad_id: int,
    *,
    label_smoothing: float = 0.0,
    targets: Tensor | None = None,
    chunk: int = 192,
) -> Tensor:
    """``captioning_loss`` of the logits ``hidden_NTD @ head_VD.T``, which are never held together.

    The gradients come with the loss, chunk by chunk and in the place of the logits, as in Liger Kernel's fused linear
    cross-entropy (Hsu et al. 2024, arXiv 2410.10989): three products, as in the plain loss. ``backward`` can run once.

    Args:
        hidden_NTD: the decoder's last states; position t predicts token t + 1; T - 1 positions.
        head_VD: the weight of the vocabulary's head, which has no bias.
        tokens_NT, pad_id, label_smoothing: as for ``captioning_loss``. Positions whose target is padding cost nothing.
        targets: ``real_targets`` of the whole batch where these rows are a part of it: the parts' losses add up.
        chunk: positions whose logits are held at a time.
    """
    target_P = tokens_NT[:, 1:].flatten()
    inputs = (hidden_NTD.flatten(0, 1), head_VD, target_P, target_P != pad_id)
    total = _LinearCrossEntropy.apply(*inputs, label_smoothing, chunk, torch.is_grad_enabled())
    return total * world_size() / (real_targets(tokens_NT, pad_id) if targets is None else targets)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _mixed(values: Tensor) -> Tensor:
    """One step of splitmix64 from each int64."""
    values = values + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ _shifted(values, shift)) * _signed(factor)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shifted to the right with zeros moving in, which int64 does not do by itself."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class _Tile(NamedTuple):
    """A part of the matrix, its place, and what its gradients are made of."""

    rows: slice
    columns: slice
    images_RE: Tensor  # times the scale
    texts_CE: Tensor
    logits_RC: Tensor
    pairs: Tensor  # the entries of logits_RC that belong together, as a view
    spare_RC: Tensor


@dataclass(frozen=True)
class _Matrix:
    """The N by G matrix scale * images @ texts.T + bias, of which only a tile exists at a time."""

    tile: int
    images_NE: Tensor
    texts_GE: Tensor
    scale: Tensor
    ids_G: Tensor | None
    bias: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return _accumulator(self.images_NE.dtype)

    @property
    def own(self) -> slice:
        """The columns whose pairs are among our rows."""
        rows = len(self.images_NE)
        return slice(rank() * rows, (rank() + 1) * rows)

    def tiles(self, first: int, last: int) -> Iterator[_Tile]:
        """The tiles of columns ``first`` to ``last``, column by column. Each is written over the one before.

        Equal captions that are no pair have the logit -inf: no probability and no gradient.
        """
        rows = len(self.images_NE)
        scale = self.scale.to(self.dtype)
        buffers = self.images_NE.new_empty(2, min(rows, self.tile) * min(last - first, self.tile), dtype=self.dtype)
        for left in range(first, last, self.tile):
            column = slice(left, min(left + self.tile, last))
            texts_CE = self.texts_GE[column].to(self.dtype)
            for top in range(0, rows, self.tile):
                row = slice(top, min(top + self.tile, rows))
                images_RE = self.images_NE[row].to(self.dtype) * scale
                size = len(images_RE), len(texts_CE)
                logits_RC, spare_RC = (buffer[: size[0] * size[1]].view(size) for buffer in buffers)
                torch.mm(images_RE, texts_CE.T, out=logits_RC)
                if self.bias is not None:
                    logits_RC += self.bias.to(self.dtype)
                diagonal = self.own.start + top - left
                if self.ids_G is not None:
                    repeated_RC = self.ids_G[self.own][row, None] == self.ids_G[column]
                    repeated_RC.diagonal(diagonal).fill_(False)
                    logits_RC.masked_fill_(repeated_RC, -math.inf)
                yield _Tile(row, column, images_RE, texts_CE, logits_RC, logits_RC.diagonal(diagonal), spare_RC)


def _gradients(matrix: _Matrix, to_probabilities: Callable[[_Tile], None], upstream: Tensor) -> tuple[Tensor, ...]:
    """The gradients (images_NE, texts_NE, scale) of a mean over rows whose slope by the logits is what
    ``to_probabilities`` leaves in their place, less 1 for each pair."""
    rows, weight = len(matrix.images_NE), upstream.to(matrix.dtype) / len(matrix.images_NE)
    images_grad_NE = torch.zeros_like(matrix.images_NE, dtype=matrix.dtype)
    # The texts of one rank at a time: its owner gets the sum over ranks, and the others need not keep it.
    for owner in range(world_size()):
        first = owner * rows
        chunk_NE = torch.zeros_like(images_grad_NE)
        for tile in matrix.tiles(first, first + rows):
            to_probabilities(tile)
            tile.pairs.sub_(1)
            images_grad_NE[tile.rows].addmm_(tile.logits_RC, tile.texts_CE)
            chunk_NE[tile.columns.start - first : tile.columns.stop - first].addmm_(tile.logits_RC.T, tile.images_RE)
        chunk_NE *= weight
        reduce_to_owner(chunk_NE, owner)
        if owner == rank():
            texts_grad_NE = chunk_NE
    images_grad_NE *= weight
    parts = zip(matrix.images_NE.split(matrix.tile), images_grad_NE.split(matrix.tile), strict=True)
    scale_grad = torch.stack([(images_RE * grad_RE).sum() for images_RE, grad_RE in parts]).sum()
    images_grad_NE *= matrix.scale.to(matrix.dtype)
    gradients = (images_grad_NE, texts_grad_NE, scale_grad)
    inputs = (matrix.images_NE, matrix.texts_GE, matrix.scale)
    return tuple(gradient.to(value.dtype) for gradient, value in zip(gradients, inputs, strict=True))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images_NE: Tensor, texts_NE: Tensor, scale: Tensor, ids_G: Tensor | None, tile: int
    ) -> Tensor:
        with torch.autocast(images_NE.device.type, enabled=False):
            matrix = _Matrix(tile, images_NE, gather_rows(texts_NE), scale, ids_G)
            peak_N, sum_N, peak_G, sum_G, pairs = _denominators(matrix)
        ctx.tile = tile
        ctx.save_for_backward(images_NE, matrix.texts_GE, scale, ids_G, peak_N, 2 * sum_N, peak_G, 2 * sum_G)
        logs = torch.stack([peak_N, sum_N.log(), peak_G[matrix.own], sum_G[matrix.own].log()])
        return ((logs.sum(dtype=torch.float64) / 2 - pairs) / len(images_NE)).to(matrix.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *parts, peak_N, twice_sum_N, peak_G, twice_sum_G = ctx.saved_tensors

        def to_probabilities(tile: _Tile) -> None:
            by_column_RC = torch.sub(tile.logits_RC, peak_G[tile.columns], out=tile.spare_RC)
            by_column_RC.exp_().div_(twice_sum_G[tile.columns])
            tile.logits_RC.sub_(peak_N[tile.rows, None]).exp_().div_(twice_sum_N[tile.rows, None]).add_(by_column_RC)

        with torch.autocast(upstream.device.type, enabled=False):
            gradients = _gradients(_Matrix(ctx.tile, *parts), to_probabilities, upstream)
        return *gradients, None, None


def _denominators(matrix: _Matrix) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(peak_N, sum_N, peak_G, sum_G, pairs): the denominators of our rows and, over every rank's rows, of all columns
    are sum * exp(peak); ``pairs`` is the sum of our pairs' logits.

    One logarithm for both, around 100 for a sharp temperature, would round away how sure a pair is.
    """
    ends = (matrix.images_NE, matrix.texts_GE)
    peak_N, peak_G = (x.new_full((len(x),), torch.finfo(matrix.dtype).min, dtype=matrix.dtype) for x in ends)
    sum_N, sum_G = torch.zeros_like(peak_N), torch.zeros_like(peak_G)
    pairs = sum_N.new_zeros((), dtype=torch.float64)
    for tile in matrix.tiles(0, len(matrix.texts_GE)):
        pairs += tile.pairs.sum()
        _add_exponentials(tile.logits_RC, 1, peak_N[tile.rows], sum_N[tile.rows], tile.spare_RC)
        _add_exponentials(tile.logits_RC, 0, peak_G[tile.columns], sum_G[tile.columns], tile.logits_RC)
    largest_G = max_over_ranks(peak_G)
    return peak_N, sum_N, largest_G, sum_over_ranks(sum_G * (peak_G - largest_G).exp()), pairs


def _add_exponentials(logits_RC: Tensor, dim: int, peak: Tensor, total: Tensor, scratch_RC: Tensor) -> None:
    """Adds to ``peak`` and ``total`` in place. The exponentials go to ``scratch_RC``, which may be the logits: to get a
    new tensor for each tile from the system takes longer than to fill it."""
    higher = torch.maximum(peak, logits_RC.amax(dim))
    exponentials_RC = torch.sub(logits_RC, higher.unsqueeze(dim), out=scratch_RC).exp_()
    total.mul_((peak - higher).exp()).add_(exponentials_RC.sum(dim))
    peak.copy_(higher)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images_NE: Tensor, texts_NE: Tensor, scale: Tensor, bias: Tensor, ids_G: Tensor | None, tile: int
    ) -> Tensor:
        # -log sigmoid(-x) = log(1 + exp x), and for a pair -log sigmoid(x) is that less x.
        with torch.autocast(images_NE.device.type, enabled=False):
            matrix = _Matrix(tile, images_NE, gather_rows(texts_NE), scale, ids_G, bias)
            total, zero = (images_NE.new_zeros((), dtype=dtype) for dtype in (torch.float64, matrix.dtype))
            for part in matrix.tiles(0, len(matrix.texts_GE)):
                total -= part.pairs.sum()
                total += torch.logaddexp(part.logits_RC, zero, out=part.spare_RC).sum()
        ctx.tile = tile
        ctx.save_for_backward(images_NE, matrix.texts_GE, scale, matrix.ids_G, bias)
        return (total / len(images_NE)).to(matrix.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        matrix = _Matrix(ctx.tile, *ctx.saved_tensors)
        probability = upstream.new_zeros((), dtype=torch.float64)

        def to_probabilities(tile: _Tile) -> None:
            probability.add_(tile.logits_RC.sigmoid_().sum())

        with torch.autocast(upstream.device.type, enabled=False):
            gradients = _gradients(matrix, to_probabilities, upstream)
        bias_grad = (upstream * (probability / len(matrix.images_NE) - 1)).to(ctx.saved_tensors[-1].dtype)
        return *gradients, bias_grad, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies over real targets; its gradients are ready before ``backward`` asks for them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        head_VD: Tensor,
        target_P: Tensor,
        real_P: Tensor,
        label_smoothing: float,
        chunk: int,
        with_gradients: bool,
    ) -> Tensor:
        hidden_needed, head_needed = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        product_dtype, dtype = _product_dtype(hidden_PD), _accumulator(hidden_PD.dtype)
        hidden_grad_PD = torch.zeros_like(hidden_PD) if hidden_needed else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=dtype) if head_needed else None
        total = hidden_PD.new_zeros((), dtype=dtype)
        places_K = real_P.nonzero().squeeze(1).split(chunk)
        buffer_KV = total.new_empty(len(places_K[0]), len(head_VD))
        with torch.autocast(hidden_PD.device.type, enabled=False):
            head = head_VD.to(product_dtype)
            for place_K in places_K:
                hidden_KD, target_K1 = hidden_PD[place_K].to(product_dtype), target_P[place_K, None]
                logits_KV = _product(hidden_KD, head.T, buffer_KV[: len(place_K)])
                total += _cross_entropy_(logits_KV, target_K1, label_smoothing)
                slope_KV = logits_KV.to(product_dtype)
                if hidden_grad_PD is not None:
                    hidden_grad_PD[place_K] = (slope_KV @ head).to(hidden_grad_PD.dtype)
                if head_grad_VD is not None:
                    _add_product(head_grad_VD, slope_KV.T, hidden_KD)
        ctx.gradients = (hidden_grad_PD, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and let go, so that the head's gradient, the largest, exists once.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("fused_captioning_loss gave its gradients away; compute the loss again")
        return *(None if grad is None else grad.mul_(upstream) for grad in gradients), None, None, None, None, None


def _product_dtype(hidden_PD: Tensor) -> torch.dtype:
    device = hidden_PD.device.type
    if torch.is_autocast_enabled(device) and hidden_PD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden_PD.dtype


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.mm(left, right, out=out) if left.dtype == out.dtype else out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right) if left.dtype == total.dtype else total.add_(left @ right)


def _cross_entropy_(logits_KV: Tensor, target_K1: Tensor, label_smoothing: float) -> Tensor:
    """The sum of the rows' cross-entropies; leaves its slope by the logits in their place."""
    smooth, sharp = label_smoothing / logits_KV.shape[1], 1 - label_smoothing
    expected_K1 = sharp * logits_KV.gather(1, target_K1)
    if smooth:
        expected_K1 += smooth * logits_KV.sum(1, keepdim=True)
    peak_K1 = logits_KV.amax(1, keepdim=True)
    sum_K1 = logits_KV.sub_(peak_K1).exp_().sum(1, keepdim=True)
    logits_KV.div_(sum_K1)
    if smooth:
        logits_KV.sub_(smooth)
    logits_KV.scatter_add_(1, target_K1, torch.full_like(expected_K1, -sharp))
    return (peak_K1 + sum_K1.log() - expected_K1).sum()
