"""What a training stage needs in order to go on after an interruption."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.tiny_model.optimizer import Average


@dataclass
class TrainingState:
    """A module in training with its average, optimizers, and the time spent so far."""

    module: nn.Module
    average: Average
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0

    def set_rate(self, rate: float) -> None:
        """Give every optimizer the same learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def descend(self, loss: torch.Tensor) -> None:
        """Take one step down a loss, with the gradient's norm clipped to one."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([weight for weight in self.module.parameters() if weight.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(self.module, self.step)
        self.step += 1

    def save(self, path: Path) -> None:
        """Write everything under a temporary name, then rename it."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def restore(self, path: Path) -> None:
        """Go on from a file that `save` wrote."""
        state = torch.load(path, weights_only=True, map_location=next(self.module.parameters()).device)
        self.module.load_state_dict(state["module"])
        self.average.weights = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
