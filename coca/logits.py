"""What is done to the logits of the next token before one is chosen.

Shapes: R rows, T tokens so far, V vocabulary, K candidates.
"""

import torch
from torch import Tensor

from coca.config import GenerationConfig


def adjust_logits(logits_RV: Tensor, tokens_RT: Tensor, config: GenerationConfig, end_id: int) -> Tensor:
    """Repetition penalty, runs that may not come again, and no end before the shortest length, in this order."""
    adjusted_RV = logits_RV
    if config.repetition_penalty != 1:
        adjusted_RV = _penalise_repetition(adjusted_RV, tokens_RT, config.repetition_penalty)
    if config.no_repeat_ngram:
        banned_RV = _repeated(tokens_RT, config.no_repeat_ngram, logits_RV.shape[1])
        banned_RV[:, end_id : end_id + 1] = False  # a caption may always end
        adjusted_RV = adjusted_RV.masked_fill(banned_RV, -torch.inf)
    if tokens_RT.shape[1] + 1 < config.min_length:
        adjusted_RV = adjusted_RV.clone()
        adjusted_RV[:, end_id : end_id + 1] = -torch.inf
    if config.no_repeat_ngram:
        # Where the rules leave nothing, they do not hold.
        adjusted_RV = torch.where(adjusted_RV.isneginf().all(dim=1, keepdim=True), logits_RV, adjusted_RV)
    return adjusted_RV


def sample(logits_RV: Tensor, uniform_R: Tensor, config: GenerationConfig) -> Tensor:
    """Tokens (R,) drawn from the tempered distribution over the likeliest tokens that top-k and top-p leave.

    Args:
        uniform_R: the draws, in [0, 1): the first token at which the summed probability, likeliest first, exceeds it.
    """
    count = min(config.top_k or logits_RV.shape[1], logits_RV.shape[1])
    sorted_RK, order_RK = torch.sort(logits_RV, dim=1, descending=True, stable=True)
    sorted_RK, order_RK = sorted_RK[:, :count], order_RK[:, :count]
    probabilities_RK = torch.softmax(sorted_RK / config.temperature, dim=1)
    if config.top_p < 1:
        before_RK = probabilities_RK.cumsum(dim=1) - probabilities_RK
        probabilities_RK = probabilities_RK.masked_fill(before_RK >= config.top_p, 0)
    summed_RK = probabilities_RK.cumsum(dim=1)
    possible_R = (probabilities_RK > 0).sum(dim=1)
    chosen_R = (summed_RK <= uniform_R[:, None] * summed_RK[:, -1:]).sum(dim=1)
    return order_RK.gather(1, torch.minimum(chosen_R, possible_R - 1)[:, None])[:, 0]


def _penalise_repetition(logits_RV: Tensor, tokens_RT: Tensor, penalty: float) -> Tensor:
    seen_RT = logits_RV.gather(1, tokens_RT)
    return logits_RV.scatter(1, tokens_RT, torch.where(seen_RT < 0, seen_RT * penalty, seen_RT / penalty))


def _repeated(tokens_RT: Tensor, size: int, vocab_size: int) -> Tensor:
    """Tokens (R, V) that would make the last ``size`` tokens a run that has been."""
    rows, length = tokens_RT.shape
    banned_RV = torch.zeros(rows, vocab_size, dtype=torch.bool, device=tokens_RT.device)
    if length < size:
        return banned_RV
    runs_RNS = tokens_RT.unfold(1, size, 1)
    last_RS = tokens_RT[:, length - size + 1 :]
    same_RN = (runs_RNS[:, :, :-1] == last_RS[:, None]).all(dim=2)
    counts_RV = torch.zeros(rows, vocab_size, dtype=torch.int64, device=tokens_RT.device)
    return counts_RV.scatter_add(1, runs_RNS[:, :, -1], same_RN.long()) > 0
