"""What training workers tell each other, beside gradients: sums, whether they agree, and buffers. Alone, each is its own group."""

import torch
import torch.distributed as dist
from torch import nn


def reduced(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all workers."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def all_equal(number: int) -> bool:
    """Whether all workers call this with the same number, of less than 63 bits."""
    if not dist.is_initialized():
        return True
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    least_and_most = torch.tensor([number, -number], device=device)
    dist.all_reduce(least_and_most, dist.ReduceOp.MIN)
    return int(least_and_most[0]) == -int(least_and_most[1])


def share_buffers(model: nn.Module) -> None:
    """Give every worker the first one's buffers: each has seen other images, so its BatchNorm has other statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
