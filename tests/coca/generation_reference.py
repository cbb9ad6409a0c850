"""Captions written the slow way, as the tests of generation expect them: the whole prefix again at every step, one row
and one candidate at a time, no cache and no tensors where a loop will do."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coca.config import GenerationConfig
from coca.model import CoCa


def next_logits(model: CoCa, image_tokens_1QD: Tensor, tokens: list[int]) -> Tensor:
    """Logits (V,) after ``tokens``, from the training pass."""
    hidden = model.unimodal(torch.tensor([tokens]))[1]
    return model.logits(model.multimodal(hidden, image_tokens_1QD))[0, -1]


def adjusted(logits: Tensor, tokens: list[int], config: GenerationConfig, end: int) -> list[float]:
    values: list[float] = logits.tolist()
    if config.repetition_penalty != 1:
        for token in set(tokens):
            value = values[token]
            values[token] = value * config.repetition_penalty if value < 0 else value / config.repetition_penalty
    size = config.no_repeat_ngram
    if size:
        runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        for token in range(len(values)):
            candidate = tuple([*tokens, token][-size:])
            if len(candidate) == size and candidate in runs and token != end:
                values[token] = -math.inf
    if len(tokens) + 1 < config.min_length:
        values[end] = -math.inf
    return logits.tolist() if size and all(v == -math.inf for v in values) else values


def log_softmax(values: list[float]) -> list[float]:
    peak = max(values)
    total = math.log(sum(math.exp(v - peak) for v in values)) + peak
    return [v - total for v in values]


def drawn(values: list[float], uniform: float, config: GenerationConfig) -> int:
    order = sorted(range(len(values)), key=lambda token: -values[token])
    order = [token for token in order if values[token] > -math.inf]
    order = order[: config.top_k or None]
    peak = values[order[0]]
    weights = [math.exp((values[token] - peak) / config.temperature) for token in order]
    total, kept, before = sum(weights), [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if before >= config.top_p:
            break
        kept.append((token, weight / total))
        before += weight / total
    mass, summed = sum(p for _, p in kept), 0.0
    for token, p in kept:
        summed += p
        if summed > uniform * mass:
            return token
    return kept[-1][0]


def write_one(
    model: CoCa, image: Tensor, prompt: list[int], uniforms: list[float], config: GenerationConfig
) -> tuple[list[int], list[float]]:
    """Greedy or sampled: one row's tokens and their log-probabilities."""
    text = model.config.text
    limit = min(config.max_length or text.context_length, text.context_length)
    _, image_tokens = model.encode_image(image[None])
    tokens, log_probs = list(prompt), [0.0] * len(prompt)
    while len(tokens) < limit:
        logits = next_logits(model, image_tokens, tokens)
        values = adjusted(logits, tokens, config, text.end_id)
        if config.force_end and len(tokens) + 1 == limit:
            token = text.end_id
        elif config.temperature:
            token = drawn(values, uniforms[len(tokens)], config)
        else:
            token = max(range(len(values)), key=lambda t: values[t])
        log_probs.append(logits.log_softmax(0)[token].item())
        tokens.append(token)
        if token in (text.end_id, text.pad_id):
            break
    return tokens, log_probs


@dataclass
class Beam:
    tokens: list[int]
    score: float  # of the search
    log_probs: list[float] = field(default_factory=list)


def search_one(
    model: CoCa, image: Tensor, prompt: list[int], config: GenerationConfig
) -> tuple[list[int], list[float]]:
    """Beam search of one image: the best caption and its log-probabilities."""
    text = model.config.text
    limit = min(config.max_length or text.context_length, text.context_length)
    size = config.beams // config.beam_groups
    _, image_tokens = model.encode_image(image[None])
    running = [[Beam(list(prompt), 0.0, [0.0] * len(prompt))] for _ in range(config.beam_groups)]
    ended: list[list[tuple[float, Beam]]] = [[] for _ in range(config.beam_groups)]
    while True:
        length = len(next(group[0].tokens for group in running if group))
        written = length + 1 - len(prompt)
        chosen: dict[int, int] = {}
        for index, group in enumerate(running):
            candidates = []
            for beam in group:
                logits = next_logits(model, image_tokens, beam.tokens)
                values = adjusted(logits, beam.tokens, config, text.end_id)
                values[text.pad_id] = -math.inf
                own, search = logits.log_softmax(0).tolist(), log_softmax(values)
                for token in range(len(values)):
                    if config.force_end and length + 1 == limit and token != text.end_id:
                        continue
                    if search[token] > -math.inf:
                        score = beam.score + search[token]
                        new = Beam([*beam.tokens, token], score, [*beam.log_probs, own[token]])
                        candidates.append((score - config.diversity_penalty * chosen.get(token, 0), new))
            candidates.sort(key=lambda each: -each[0])
            best = [new for _, new in candidates[: 2 * size]]
            for new in [new for new in best[:size] if new.tokens[-1] == text.end_id]:
                ended[index].append((new.score / written**config.length_penalty, new))
            ended[index] = sorted(ended[index], key=lambda each: -each[0])[:size]
            running[index] = [new for new in best if new.tokens[-1] != text.end_id][:size]
            for new in running[index]:
                chosen[new.tokens[-1]] = chosen.get(new.tokens[-1], 0) + 1
        alive = any(running)
        if not alive or length + 1 == limit:
            for index, group in enumerate(running):
                ended[index] += [(new.score / written**config.length_penalty, new) for new in group]
                ended[index] = sorted(ended[index], key=lambda each: -each[0])[:size]
            break
        divisor = (limit - len(prompt) if config.length_penalty > 0 else written) ** config.length_penalty
        done = []
        for index, group in enumerate(running):
            attainable = max((beam.score for beam in group), default=-math.inf) / divisor
            worst = ended[index][-1][0] if len(ended[index]) == size else -math.inf
            done.append(worst >= attainable)
        if all(done):
            break
    _, best_beam = max((each for group in ended for each in group), key=lambda each: each[0])
    return best_beam.tokens, best_beam.log_probs
