"""Optimizers, their parameter groups and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn

from coca.train_config import OptimizerConfig


class Optimizer:
    """AdamW, or Muon on the hidden matrices with AdamW on the rest, behind one schedule.

    Muon (Jordan et al. 2024) is made for matrices between hidden states: embeddings, positions, queries, the head, the
    patch projection, biases and gains stay with AdamW.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int) -> None:
        self._config, self._steps = config, steps
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        matrices: list[nn.Parameter] = []
        gains: list[nn.Parameter] = []
        hidden: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if config.name == "muon" and _is_hidden_matrix(name, parameter):
                hidden.append(parameter)
            else:
                (matrices if parameter.ndim >= 2 else gains).append(parameter)
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ]
        self._inner: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas), config.learning_rate)
        ]
        if hidden:
            muon = torch.optim.Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
            self._inner.append((muon, config.muon_learning_rate))

    def learning_rate(self, step: int) -> float:
        """AdamW's rate at a step, counted from 0."""
        return self._config.learning_rate * schedule(step, self._steps, self._config)

    def step(self, step: int) -> float:
        """Clip the gradients, update the weights, clear the gradients.

        Returns:
            The gradients' global norm before clipping.
        """
        norm = nn.utils.clip_grad_norm_(list(self._names), self._config.max_grad_norm)
        factor = schedule(step, self._steps, self._config)
        for optimizer, peak in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor, named ``<parameter>/<state>``."""
        found = {}
        for optimizer, _ in self._inner:
            for parameter, name in self._names.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    found[f"{name}/{key}"] = torch.as_tensor(value)
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up a saved state; missing names are a programmer's error, since checkpoint and model agree."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        owner = {p: o for o, _ in self._inner for group in o.param_groups for p in group["params"]}
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            # AdamW counts its steps in a CPU tensor wherever the parameter lies.
            device = "cpu" if key == "step" else parameter.device
            owner[parameter].state[parameter][key] = value.to(device)


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak rate at ``step`` of ``steps``: up linearly over the warm-up, then down to 0 at the end."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    outside = ("embedding", "positions", "queries", "registers", "head", "_projection")
    return parameter.ndim == 2 and not any(part in name for part in outside)
