"""The training loop that every worker runs: data-parallel steps, reduced metrics, a checkpoint each epoch.

Sums and counts are reduced over the workers, then divided: uneven last batches weigh by their images, and every worker acts on the
same numbers. BatchNorm keeps its pretrained statistics, so that a batch's result does not depend on how many workers share it.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel
from torch import nn

from dragonclf.train import checkpoint
from dragonclf.train.data import Samples
from dragonclf.train.order import Order

EVAL_BATCH_SIZE = 256
WARM_UP = 0.3  # share of the steps


class Recipe(BaseModel):
    """The numbers of a training run."""

    epochs: int
    lr: float
    weight_decay: float
    global_batch_size: int
    seed: int


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


def one_cycle(step: int, *, total_steps: int) -> float:
    """Share of the greatest learning rate at a step: cosine up from 1/25 over the first 30 %, cosine down to 0 (Smith's 1cycle, as fastai).

    Taken at the middle of each step, so that the shortest runs learn too.
    """
    place = min((step + 0.5) / total_steps, 1.0)
    if place < WARM_UP:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * place / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (place - WARM_UP) / (1 - WARM_UP))) / 2


def fit(
    model: nn.Module,
    train: Samples,
    valid: Samples,
    recipe: Recipe,
    *,
    run_uri: str,
    rank: int,
    world_size: int,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module],
    report: Callable[[dict[str, float]], None],
) -> None:
    """Train to the end of `recipe.epochs`, from the newest checkpoint under `run_uri` if there is one.

    `wrap` makes the model data-parallel; `report` gets each epoch's metrics, equal on every worker. ValueError if the loss stops
    being finite.
    """
    order = Order(len(train), recipe.global_batch_size, recipe.seed)
    model = model.to(device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.lr)
    total = recipe.epochs * order.num_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, total_steps=total))
    state = checkpoint.load_newest(run_uri, num_epochs=recipe.epochs)
    history: list[dict[str, float]] = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history = state["history"]
        if rank == 0 and checkpoint.read_results(run_uri) != history:  # killed between a checkpoint and its results
            checkpoint.write_results(run_uri, history)
    parallel = wrap(model)
    for epoch in range(len(history), recipe.epochs):
        started = time.monotonic()
        _train_mode(model)
        loss, lr = _train_epoch(parallel, optimizer, schedule, train, order, epoch, rank, world_size, device)
        metrics = _validate(model, valid, rank, world_size, device)
        row = {"epoch": epoch + 1, "train_loss": loss, **metrics, "lr": lr}
        history.append(row | {"seconds": round(time.monotonic() - started, 3)})
        if rank == 0:
            states: dict[str, Any] = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            checkpoint.save(run_uri, {"epoch": epoch + 1, "model": model.state_dict(), "history": history, **states})
        report(row)


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, train: Samples,
    order: Order, epoch: int, rank: int, world_size: int, device: torch.device,
) -> tuple[float, float]:  # fmt: skip
    """Mean loss over the epoch's images, over all workers, and the learning rate of the last step."""
    # A worker without an image in a short last step still joins it, with some image at weight 0: all-reduce waits for everyone.
    batches = order.batches(epoch, rank=rank, world_size=world_size)
    stand_in = np.zeros(1, np.int64)
    filled = [batch if len(batch) else stand_in for batch in batches]
    total = torch.zeros((), dtype=torch.float64, device=device)
    lr = 0.0
    for step, (inputs, targets) in enumerate(train.batches(filled, epoch=epoch)):
        loss = F.cross_entropy(_logits(model, inputs.to(device)), targets.to(device), reduction="sum") * bool(
            len(batches[step])
        )
        optimizer.zero_grad(set_to_none=True)
        (loss * (world_size / order.global_count(step))).backward()  # data-parallel averages gradients over workers
        optimizer.step()
        lr = float(schedule.get_last_lr()[0])
        schedule.step()
        total += loss.detach()
    mean = float(_reduced(total)) / order.num_samples
    if not np.isfinite(mean):
        raise ValueError(f"the loss is {mean} in epoch {epoch + 1}: lower --lr")
    return mean, lr


@torch.no_grad()
def _validate(model: nn.Module, valid: Samples, rank: int, world_size: int, device: torch.device) -> dict[str, float]:
    """Loss and accuracy over all validation images, each counted once whatever the number of workers."""
    model.eval()
    own = np.arange(rank, len(valid), world_size)
    parts = [own[start : start + EVAL_BATCH_SIZE] for start in range(0, len(own), EVAL_BATCH_SIZE)]
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, count
    for inputs, targets in valid.batches(parts, epoch=0):
        logits, targets = _logits(model, inputs.to(device)), targets.to(device)
        sums[0] += F.cross_entropy(logits, targets, reduction="sum")
        sums[1] += (logits.argmax(1) == targets).sum()
        sums[2] += len(targets)
    loss, correct, count = _reduced(sums).tolist()
    return {"valid_loss": loss / count, "valid_accuracy": correct / count}


def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    outputs = model(inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _reduced(sums: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay on biases and norms: they are the tensors of one dimension."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    kept = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
