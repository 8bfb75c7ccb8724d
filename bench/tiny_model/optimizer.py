"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices and convolutions, AdamW for the rest."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a matrix towards one.

    The polynomial is iterated on the Gram matrix of the shorter side, so only two products involve the longer one.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    identity = torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)
    product = identity
    for _ in range(steps):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    result = product @ wide
    return result.T if tall else result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; convolutions count as [out, in * kernel] matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        buffer = state["momentum"]
        buffer.lerp_(weight.grad, 1 - group["momentum"])
        direction = torch.lerp(weight.grad, buffer, group["momentum"]).flatten(1)
        scale = UPDATE_RMS * math.sqrt(max(direction.shape))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(orthogonalize(direction).view_as(weight), alpha=-group["lr"] * scale)


def build_optimizers(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float) -> list:
    """Return Muon for `matrices` and AdamW for `others`, at the same learning rate."""
    return [
        Muon(matrices, lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def learning_rate(progress: float, step: int, peak: float, hold: float, warmup_steps: int) -> float:
    """Return the rate at `progress` in [0, 1]: warm-up, flat until `hold`, then a cosine to zero."""
    rate = peak * min(1.0, (step + 1) / warmup_steps)
    if progress > hold:
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - hold) / (1 - hold)))) + 0.01
    return rate


class Average:
    """Exponential moving average of a module's parameters, quick to follow at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in module.state_dict().items():
            self.weights[name].lerp_(weight, 1 - decay)
