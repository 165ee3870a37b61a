"""Muon for matrices, Adam for the rest, with float32 master weights.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix, here with the update scaled to Adam's size (Liu et al., arXiv 2502.16982):
small networks then need about half the steps, which counts when training runs on a laptop's CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with singular values near one, by Newton-Schulz iteration in bfloat16."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(torch.bfloat16)
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Optimizer:
    """Keeps a float32 master and a running average of each parameter; parameters may be bfloat16.

    Call `step` after `backward`; it clears the gradients. `load_average` puts the averages into the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, clip: float = 1.0, average: float = 0.99) -> None:
        self.weights = [p for p in parameters if p.requires_grad]
        self.masters = [p.detach().clone().float() for p in self.weights]
        self.averages = [m.clone() for m in self.masters]
        self.matrix = [m.ndim > 1 and min(m.shape[0], m[0].numel()) >= 16 for m in self.masters]
        self.momenta = [torch.zeros_like(m) for m in self.masters]
        self.squares = [torch.zeros_like(m) for m in self.masters]
        self.lr, self.clip, self.average, self.steps = lr, clip, average, 0

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One update with the learning rate times `factor`; returns the norm of the gradient."""
        grads = [torch.zeros_like(m) if w.grad is None else w.grad.float() for w, m in zip(self.weights, self.masters)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = float((self.clip / (norm + 1e-6)).clamp(max=1))
        self.steps += 1
        lr, decay = self.lr * factor, min(self.average, self.steps / (self.steps + 20))
        for i, grad in enumerate(grads):
            master, momentum, square = self.masters[i], self.momenta[i], self.squares[i]
            grad = grad * scale
            if self.matrix[i]:
                momentum.mul_(0.95).add_(grad)
                flat = (grad + 0.95 * momentum).reshape(len(master), -1)
                update = orthogonalise(flat).reshape_as(master) * (0.2 * max(flat.shape) ** 0.5)
            else:
                momentum.lerp_(grad, 0.1)
                square.lerp_(grad * grad, 0.02)
                update = momentum / (1 - 0.9**self.steps) / ((square / (1 - 0.98**self.steps)).sqrt() + 1e-8)
            master.add_(update, alpha=-lr)
            self.averages[i].lerp_(master, 1 - decay)
            self.weights[i].copy_(master)
            self.weights[i].grad = None
        return float(norm)

    @torch.no_grad()
    def load_average(self) -> None:
        for weight, average in zip(self.weights, self.averages):
            weight.data = average.clone()
