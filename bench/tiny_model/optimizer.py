"""Muon for matrices and convolutions (https://kellerjordan.github.io/posts/muon/), AdamW for the rest."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def orthogonalize(matrices_NRC: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix in a stack towards one.

    The polynomial is iterated on the Gram matrix of the shorter side, so only two products involve the longer one.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    wide = matrices_NRC.mT if tall else matrices_NRC
    wide = wide / (torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True) + 1e-7)
    gram = wide @ wide.mT
    identity = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    product = identity.expand_as(gram)
    for _ in range(steps):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    result = product @ wide
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; convolutions count as [out, in * kernel] matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand, weights of one shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
            for weights in by_shape.values():
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict) -> None:
        directions = torch.stack([way.flatten(1) for way in self._directions(weights, group["momentum"])])
        scale = UPDATE_RMS * math.sqrt(max(directions.shape[1:]))
        updates = orthogonalize(directions)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        shaped = [update.reshape(weight.shape) for weight, update in zip(weights, updates, strict=True)]
        torch._foreach_add_(weights, shaped, alpha=-group["lr"] * scale)

    def _directions(self, weights: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Return the gradients with Nesterov momentum."""
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, momenta, momentum)


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
        now = module.state_dict()
        torch._foreach_lerp_([self.weights[name] for name in now], list(now.values()), 1 - decay)
