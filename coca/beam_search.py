"""Beam search with a length penalty, and with groups that avoid each other's tokens.

Shapes: B images, I images still searched, G groups, N beams of a group, K candidates, T tokens up to the longest
caption, V vocabulary, R = I * G * N rows of the decoder.
"""

import torch
from torch import Tensor

from coca.config import GenerationConfig
from coca.decoder import Decoder
from coca.logits import adjust_logits
from coca.prompts import Prompts


class Beams:
    """Captions by group, best first: the ``scores_IGN`` order them, -inf where there is none."""

    def __init__(self, scores_IGN: Tensor, tokens_IGNT: Tensor, log_probs_IGNT: Tensor) -> None:
        self.scores_IGN, self.tokens_IGNT, self.log_probs_IGNT = scores_IGN, tokens_IGNT, log_probs_IGNT

    def group(self, index: int, order_IK: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens_IKT, log_probs_IKT) of one group's beams in this order."""
        rows_I1 = torch.arange(len(order_IK), device=order_IK.device)[:, None]
        return self.tokens_IGNT[rows_I1, index, order_IK], self.log_probs_IGNT[rows_I1, index, order_IK]

    def add(self, index: int, scores_IK: Tensor, tokens_IKT: Tensor, log_probs_IKT: Tensor) -> None:
        """Let captions compete for the places of one group."""
        scores = torch.cat([self.scores_IGN[:, index], scores_IK], dim=1)
        self.scores_IGN[:, index], order_IN = scores.topk(self.scores_IGN.shape[2], dim=1)
        for kept, new in ((self.tokens_IGNT, tokens_IKT), (self.log_probs_IGNT, log_probs_IKT)):
            both = torch.cat([kept[:, index], new], dim=1)
            kept[:, index] = both.gather(1, order_IN[..., None].expand(-1, -1, both.shape[2]))

    def keep(self, images_I: Tensor) -> None:
        for name in ("scores_IGN", "tokens_IGNT", "log_probs_IGNT"):
            setattr(self, name, getattr(self, name)[images_I])


def beam_search(decoder: Decoder, prompts: Prompts, config: GenerationConfig, end_id: int) -> tuple[Tensor, Tensor]:
    """The best caption found for each image: (tokens_BT, log_probs_BT).

    Captions compete by their log-probability over their length, the prompt not counted, to the power of the length
    penalty. A group is done when it holds as many ended captions as it has beams and no running one can pass them; an
    image leaves the work when all its groups are done. Padding is never chosen.
    """
    groups, size = config.beam_groups, config.beams // config.beam_groups
    batch, max_length = prompts.tokens_BT.shape
    device, length = prompts.tokens_BT.device, prompts.shortest
    logits_RV = decoder.step(prompts.tokens_BT[:, :length])
    everyone_R = torch.arange(batch, device=device).repeat_interleave(config.beams)
    decoder.select(everyone_R)
    logits_RV = logits_RV[everyone_R]
    running = _empty_beams(prompts, groups, size, logits_RV)
    running.scores_IGN[:, :, 0] = 0  # the others begin as its copies: they count once there is something to choose
    ended = _empty_beams(prompts, groups, size, logits_RV)
    images_I = torch.arange(batch, device=device)
    tokens_BT, log_probs_BT = prompts.tokens_BT.clone(), logits_RV.new_zeros(batch, max_length)
    prompt_lengths_B = prompts.forced_BT.sum(dim=1)

    while True:
        forced_I = prompts.forced_BT[images_I, length]
        own_RV = logits_RV.log_softmax(dim=1)  # what the model itself thinks
        search_RV = _search_log_probs(logits_RV, running, prompts, config, images_I, length, end_id)
        lengths_I = length + 1 - prompt_lengths_B[images_I]
        parents_IGN = _advance(running, ended, search_RV, own_RV, forced_I, lengths_I, length, config, end_id)
        length += 1
        if length == max_length:
            done_I = torch.ones_like(forced_I)
            for index in range(groups):
                scores_IN = running.scores_IGN[:, index] / lengths_I[:, None] ** config.length_penalty
                ended.add(index, scores_IN, running.tokens_IGNT[:, index], running.log_probs_IGNT[:, index])
        else:
            done_I = _done(running, ended, lengths_I, max_length - prompt_lengths_B[images_I], config) & ~forced_I
        best_I = ended.scores_IGN.flatten(1).argmax(dim=1)
        rows_I = torch.arange(len(images_I), device=device)
        tokens_BT[images_I[done_I]] = ended.tokens_IGNT.flatten(1, 2)[rows_I, best_I][done_I]
        log_probs_BT[images_I[done_I]] = ended.log_probs_IGNT.flatten(1, 2)[rows_I, best_I][done_I]
        if bool(done_I.all()):
            longest = int((tokens_BT != prompts.pad_id).sum(dim=1).max())  # padding stands behind captions only
            return tokens_BT[:, :longest], log_probs_BT[:, :longest]

        rows_IGN = parents_IGN + (rows_I[:, None] * groups + torch.arange(groups, device=device))[..., None] * size
        if bool(done_I.any()):
            going_on = (~done_I).nonzero()[:, 0]
            images_I, rows_IGN = images_I[going_on], rows_IGN[going_on]
            running.keep(going_on)
            ended.keep(going_on)
            decoder.select(rows_IGN.flatten(), going_on)
        elif not torch.equal(rows_IGN.flatten(), torch.arange(rows_IGN.numel(), device=device)):
            decoder.select(rows_IGN.flatten())
        logits_RV = decoder.step(running.tokens_IGNT[..., length - 1].reshape(-1, 1))


def _empty_beams(prompts: Prompts, groups: int, size: int, like: Tensor) -> Beams:
    batch, length = prompts.tokens_BT.shape
    tokens_IGNT = prompts.tokens_BT[:, None, None].repeat(1, groups, size, 1)
    scores_IGN = like.new_full((batch, groups, size), -torch.inf)
    return Beams(scores_IGN, tokens_IGNT, like.new_zeros(batch, groups, size, length))


def _search_log_probs(
    logits_RV: Tensor,
    running: Beams,
    prompts: Prompts,
    config: GenerationConfig,
    images_I: Tensor,
    length: int,
    end_id: int,
) -> Tensor:
    """Log-probabilities that the search goes by: adjusted, without padding, certain where the prompt decides."""
    adjusted_RV = adjust_logits(logits_RV, running.tokens_IGNT[..., :length].flatten(0, 2), config, end_id)
    adjusted_RV = adjusted_RV.index_fill(1, torch.tensor([prompts.pad_id], device=logits_RV.device), -torch.inf)
    search_RV = adjusted_RV.log_softmax(dim=1)
    if config.force_end and length + 1 == prompts.tokens_BT.shape[1]:
        only_end_V = torch.arange(search_RV.shape[1], device=search_RV.device) == end_id
        search_RV = search_RV.masked_fill(~only_end_V, -torch.inf)
    if bool(prompts.forced_BT[images_I, length].any()):
        rows_R = images_I.repeat_interleave(config.beams)
        certain_RV = torch.full_like(search_RV, -torch.inf)
        certain_RV.scatter_(1, prompts.tokens_BT[rows_R, length][:, None], 0.0)
        search_RV = torch.where(prompts.forced_BT[rows_R, length][:, None], certain_RV, search_RV)
    return search_RV


def _advance(
    running: Beams,
    ended: Beams,
    search_RV: Tensor,
    own_RV: Tensor,
    forced_I: Tensor,
    lengths_I: Tensor,
    length: int,
    config: GenerationConfig,
    end_id: int,
) -> Tensor:
    """Give every running caption its next token, move those that end, and say whom each continues (I, G, N)."""
    images, groups, size = running.scores_IGN.shape
    vocab_size = search_RV.shape[1]
    search_IGNV = search_RV.view(images, groups, size, vocab_size)
    own_IGX = own_RV.view(images, groups, size * vocab_size)
    chosen_before_IV = torch.zeros_like(search_IGNV[:, 0, 0])
    parents_IGN = torch.empty(images, groups, size, dtype=torch.int64, device=search_RV.device)
    for index in range(groups):
        scores_INV = running.scores_IGN[:, index, :, None] + search_IGNV[:, index]
        ranked_INV = scores_INV - config.diversity_penalty * chosen_before_IV[:, None] if index else scores_INV
        # At most one candidate a beam ends: twice as many leave enough that go on.
        places_IK = ranked_INV.flatten(1).topk(2 * size, dim=1).indices
        scores_IK = scores_INV.flatten(1).gather(1, places_IK)
        parents_IK, next_IK = places_IK // vocab_size, places_IK % vocab_size
        own_IK = own_IGX[:, index].gather(1, places_IK).masked_fill(forced_I[:, None], 0)
        ends_IK = (next_IK == end_id) & ~forced_I[:, None]
        tokens_IKT, log_probs_IKT = running.group(index, parents_IK)
        tokens_IKT[..., length], log_probs_IKT[..., length] = next_IK, own_IK

        within_K = torch.arange(2 * size, device=places_IK.device) < size
        ended_IK = (scores_IK / lengths_I[:, None] ** config.length_penalty).masked_fill(
            ~(ends_IK & within_K), -torch.inf
        )
        ended.add(index, ended_IK, tokens_IKT, log_probs_IKT)

        order_IN = ends_IK.long().argsort(dim=1, stable=True)[:, :size]
        rows_I1 = torch.arange(images, device=places_IK.device)[:, None]
        running.scores_IGN[:, index] = scores_IK.masked_fill(ends_IK, -torch.inf)[rows_I1, order_IN]
        running.tokens_IGNT[:, index] = tokens_IKT[rows_I1, order_IN]
        running.log_probs_IGNT[:, index] = log_probs_IKT[rows_I1, order_IN]
        parents_IGN[:, index] = parents_IK[rows_I1, order_IN]
        alive_IN = running.scores_IGN[:, index].isfinite().to(chosen_before_IV)
        chosen_before_IV = chosen_before_IV.scatter_add(1, next_IK[rows_I1, order_IN], alive_IN)
    return parents_IGN


def _done(running: Beams, ended: Beams, lengths_I: Tensor, longest_I: Tensor, config: GenerationConfig) -> Tensor:
    """Whether all groups of an image are done: a log-probability only falls, and its best divisor is known."""
    divisor_I = (longest_I if config.length_penalty > 0 else lengths_I) ** config.length_penalty
    attainable_IG = running.scores_IGN.amax(dim=2) / divisor_I[:, None]
    return (ended.scores_IGN.amin(dim=2) >= attainable_IG).all(dim=1)
