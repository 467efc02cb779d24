"""The head on precomputed features: what is trained where the backbone stays as it is."""

import torch
from torch import nn


class Head(nn.Module):
    """A linear layer on standardised features. `folded` gives the equal layer on raw ones."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, features: torch.Tensor, num_classes: int):
        """`features` float32 (N, F) are all training features: their mean and deviation standardise."""
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0, correction=0).clamp_min(1e-6))
        self.linear = nn.Linear(features.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32 (B, F) to logits (B, K)."""
        return self.linear((features - self.mean) / self.std)


def folded(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (K, F) and bias (K) that give on raw features what a `Head` with this state gives."""
    weight = state["linear.weight"] / state["std"]
    return weight, state["linear.bias"] - weight @ state["mean"]
