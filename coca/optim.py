"""One step of optimization, behind one schedule: clipping, and AdamW, Adafactor or Muon on what they are each for.

Parameters may be whole, or sharded by FSDP2 (DTensors): then every rank updates its rows, and what needs the others'
(the gradients' norm, Adafactor's columns, Muon's matrices) is summed or exchanged among the ranks of a copy.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coca.adafactor import Adafactor
from coca.muon import Muon
from coca.parameter_rules import Treatment, treatments
from coca.schedule import schedule
from coca.shards import by_shard_group, local, sharded_like
from coca.train_config import OptimizerConfig

# State that is no row of the parameter: every rank holds all of it.
_WHOLE = ("step", "column")


class Optimizer:
    """AdamW for all, Adafactor for all, or Muon on the hidden matrices with AdamW on the rest.

    To be made after the model is spread over ranks, since FSDP2 puts other parameters in the place of the model's.
    State is allocated at once. A parameter whose rule has the rate factor 0 has no state, and its gradient no part in
    the norm.

    Raises:
        BadInput: a rule of the config counts for no parameter.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int) -> None:
        self._config, self._steps = config, steps
        self._parameters = dict(model.named_parameters())
        by_name = treatments(self._parameters, config)
        self._learning = {name: p for name, p in self._parameters.items() if by_name[name].learning_rate_factor > 0}
        # torch's AdamW mixes no DTensors with tensors: it gets the parts that lie here.
        self._stepped = {
            name: local(p) if by_name[name].optimizer == "adamw" else p for name, p in self._learning.items()
        }
        self._inner = {kind: self._make(kind, groups) for kind, groups in _grouped(self._stepped, by_name).items()}

    def learning_rate(self, step: int) -> float:
        """AdamW's or Adafactor's rate at a step, counted from 0, without a rule's factor."""
        return self._config.learning_rate * schedule(step, self._steps, self._config)

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Clip the gradients, update the weights, clear the gradients. Every rank calls it.

        Returns:
            The gradients' global norm before clipping, over all ranks and the same on each. Where it is not finite,
            nothing has changed but that the gradients are cleared.
        """
        gradients = [p.grad for p in self._learning.values() if p.grad is not None]
        norm = _global_norm(gradients)
        value = float(norm)
        if math.isfinite(value):
            _scale(gradients, self._config.max_grad_norm / (norm + 1e-6))
            self._bind_parts()
            factor = schedule(step, self._steps, self._config)
            for kind, optimizer in self._inner.items():
                for group in optimizer.param_groups:
                    group["lr"] = self._peak(kind) * factor * group["learning_rate_factor"]
                optimizer.step()
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if name in self._stepped:
                self._stepped[name].grad = None
        return value

    def state(self) -> dict[str, Tensor]:
        """Every state tensor, named ``<parameter>/<state>``, sharing memory with the optimizer: a restore writes into
        them. What has a row for each of a sharded parameter's is sharded as it is."""
        found = {}
        for name, stepped in self._stepped.items():
            for optimizer in self._inner.values():
                for key, value in optimizer.state.get(stepped, {}).items():
                    part = value if key in _WHOLE else sharded_like(self._learning[name], value)
                    found[f"{name}/{key}"] = part
        return found

    def _make(self, kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if kind == "muon":
            return Muon(groups, learning_rate=self._peak(kind))
        if kind == "adafactor":
            return Adafactor(groups, learning_rate=self._peak(kind), betas=self._config.betas)
        fused = _has_fused_kernel(groups)
        optimizer = torch.optim.AdamW(groups, lr=self._peak(kind), betas=self._config.betas, fused=fused)
        for group in optimizer.param_groups:
            for part in group["params"]:
                zeros = {key: torch.zeros_like(part.detach()) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[part] = {"step": torch.zeros((), device=part.device if fused else "cpu")} | zeros
        return optimizer

    def _peak(self, kind: str) -> float:
        return self._config.muon_learning_rate if kind == "muon" else self._config.learning_rate

    def _bind_parts(self) -> None:
        """Give AdamW's parts their gradients, and the memory of the weights, which FSDP2 may have replaced."""
        for name, part in self._stepped.items():
            parameter = self._learning[name]
            if part is not parameter:
                part.data = local(parameter)
                part.grad = None if parameter.grad is None else local(parameter.grad)


def _grouped(stepped: dict[str, Tensor], by_name: dict[str, Treatment]) -> dict[str, list[dict[str, Any]]]:
    """torch's parameter groups for each kind of optimizer: parameters of one treatment, in the model's order."""
    members: dict[Treatment, list[Tensor]] = {}
    for name, part in stepped.items():
        members.setdefault(by_name[name], []).append(part)
    groups: dict[str, list[dict[str, Any]]] = {}
    for treatment, parts in members.items():
        settings = {"weight_decay": treatment.weight_decay, "learning_rate_factor": treatment.learning_rate_factor}
        groups.setdefault(treatment.optimizer, []).append({"params": parts, **settings})
    return groups


def _has_fused_kernel(groups: list[dict[str, Any]]) -> bool:
    """One pass over weights, gradients and moments instead of one for each operation. Not on CPUs, where what an
    element becomes depends on how threads share out the tensor: a run would not go on bit for bit with more of them."""
    return all(part.is_cuda for group in groups for part in group["params"])


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, those of other ranks' rows included."""
    norms = [torch.zeros(())] if not gradients else []
    for group, members in by_shard_group(gradients):
        norm = nn.utils.get_total_norm([local(gradient) for gradient in members])
        if group is not None:
            square = norm.double().square()
            dist.all_reduce(square, group=group)
            norm = square.sqrt().to(norm.dtype)
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply in place where ``factor`` is below 1."""
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor.clamp(max=1.0))
