"""The training loop that every worker runs: data-parallel steps, reduced metrics, a checkpoint each epoch.

Sums and counts are reduced over the workers, then divided: uneven last batches weigh by their images, and every worker acts on the
same numbers. BatchNorm keeps its pretrained statistics, so that a batch's result does not depend on how many workers share it.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dragonclf.train import calibration, checkpoint
from dragonclf.train.data import Batch, Samples
from dragonclf.train.order import Order
from dragonclf.train.recipe import Recipe, freeze, set_lr

EVAL_BATCH_SIZE = 64


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
    """Train to the end of the recipe's epochs, from the newest checkpoint under `run_uri` if there is one.

    A run that was stopped anywhere and goes on comes to the same bits as one that was not, on a CPU, with the same number of workers.
    `wrap` makes the model data-parallel; `report` gets each epoch's metrics, equal on every worker. ValueError if the loss stops
    being finite.
    """
    trainer = Trainer(model, train, recipe, rank=rank, world_size=world_size, device=device)
    done = trainer.resume(checkpoint.load_agreed(run_uri, _all_equal))
    if rank == 0 and trainer.history and checkpoint.read_results(run_uri) != trainer.history:
        checkpoint.write_results(run_uri, trainer.history)  # killed between a checkpoint and its results
    parallel: nn.Module | None = None
    with checkpoint.Writer(run_uri) as writer:

        def save(state: dict[str, Any], *, best: bool = False) -> None:
            if rank == 0:
                writer.save(state, best=best)

        for epoch in range(done.epoch, recipe.total_epochs):
            if parallel is None or epoch == recipe.freeze_epochs:
                freeze(model, frozen=recipe.frozen(epoch))
                parallel = None  # its hooks go with it, before others come
                gc.collect()
                parallel = wrap(model)
            started_s = time.monotonic()
            loss, lr, waited_s = trainer.epoch(parallel, epoch, done, save)
            trained_s = time.monotonic() - started_s
            done = _Done(epoch + 1)
            row = {
                "epoch": epoch + 1,
                "train_loss": loss,
                **_validate(model, valid, rank, world_size, device),
                "lr": lr,
            }
            times = {
                "seconds": round(time.monotonic() - started_s, 3),
                "waited": round(waited_s / trained_s, 4),
                "workers": world_size,
            }
            trainer.history.append(row | times)
            save(trainer.state(done), best=checkpoint.is_best(trainer.history))
            report(row)


@dataclass(frozen=True)
class _Done:
    """How far a run has come: whole epochs, steps of the next one, and the sum of the losses of those steps over all workers."""

    epoch: int
    step: int = 0
    loss: float = 0.0


class Trainer:
    """A model, its optimizer, and where they are."""

    def __init__(
        self, model: nn.Module, train: Samples, recipe: Recipe, *, rank: int, world_size: int, device: torch.device
    ):
        self._model = model.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._train, self._recipe = train, recipe
        self._rank, self._world_size, self._device = rank, world_size, device
        self.order = Order(len(train), recipe.global_batch_size, recipe.seed)
        self._optimizer = recipe.new_optimizer(model)
        self._loss = recipe.new_loss(train.targets, device)
        self._waited_s = 0.0
        self.history: list[dict[str, float]] = []

    def resume(self, state: dict[str, Any] | None) -> _Done:
        if state is None:
            return _Done(0)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
        return _Done(state["epoch"], state["step"], state["loss"])

    def state(self, done: _Done) -> dict[str, Any]:
        """All that the next step depends on. Augmentation, order and dropout are functions of the seed and the place, and not in it."""
        return {
            "epoch": done.epoch, "step": done.step, "loss": done.loss, "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(), "history": self.history,
        }  # fmt: skip

    def epoch(
        self, parallel: nn.Module, epoch: int, done: _Done, save: Callable[[dict[str, Any]], None]
    ) -> tuple[float, float, float]:
        """Mean loss of the epoch's images over all workers, the head's last learning rate, and the seconds spent waiting for data here."""
        recipe, num_steps, waited_s = self._recipe, self.order.num_steps, self._waited_s
        total = torch.tensor(done.loss if self._rank == 0 else 0.0, dtype=torch.float64, device=self._device)

        def lr_at(step: int) -> float:
            return recipe.lr_at(epoch, step, num_steps=num_steps)

        for place, loss in self.steps(parallel, epoch, first=done.step, lr_at=lr_at):
            total += loss
            if recipe.checkpoint_every and place % recipe.checkpoint_every == 0 and place < num_steps:
                save(self.state(_Done(epoch, place, _finite(total.clone(), epoch))))
        return _finite(total, epoch) / self.order.num_samples, lr_at(num_steps - 1), self._waited_s - waited_s

    def steps(
        self, parallel: nn.Module, epoch: int, *, first: int, lr_at: Callable[[int], float]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Take an epoch's steps from `first` on; yield after each how many are done and the sum of the losses of this worker's images."""
        recipe, order = self._recipe, self.order
        _train_mode(self._model)
        own = order.batches(epoch, rank=self._rank, world_size=self._world_size)
        micro = [part for batch in own[first:] for part in np.array_split(batch, recipe.accumulate)]
        # A worker without an image in a short last step still joins it, with one of its images at weight 0: all-reduce waits for everyone.
        filler = own[0][:1] if len(own[0]) else np.zeros(1, np.int64)
        batches = self._train.batches([part if len(part) else filler for part in micro], epoch=epoch)
        weights = (float(len(part) > 0) for part in micro)
        for step in range(first, order.num_steps):
            torch.manual_seed(_draw(recipe.seed, epoch, step, self._rank))  # dropout
            set_lr(self._optimizer, lr_at(step))
            self._optimizer.zero_grad(set_to_none=True)
            share = self._world_size / order.global_count(step)  # data-parallel averages gradients over workers
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for number in range(recipe.accumulate):
                with _alone(parallel, alone=number + 1 < recipe.accumulate):
                    loss = self._sum_of_losses(parallel, self._next(batches)) * next(weights)
                    (loss * share).backward()
                total += loss.detach()
            if recipe.clip_grad:
                nn.utils.clip_grad_norm_(self._model.parameters(), recipe.clip_grad)
            self._optimizer.step()
            yield step + 1, total

    def _next(self, batches: Iterator[Batch]) -> Batch:
        started_s = time.monotonic()
        batch = next(batches)
        self._waited_s += time.monotonic() - started_s
        return batch

    def _sum_of_losses(self, parallel: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.amp):
            logits = _logits(parallel, inputs)
        return self._loss(logits, targets)


def _finite(total: torch.Tensor, epoch: int) -> float:
    """The sum of losses over all workers. ValueError if it is not finite: such a state is not worth keeping."""
    loss = float(reduced(total))
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss} in epoch {epoch + 1}: lower --lr")
    return loss


def _draw(*place: int) -> int:
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def _alone(parallel: nn.Module, *, alone: bool) -> contextlib.AbstractContextManager[None]:
    """Leave gradients where they are, for the step's last part to sum over the workers."""
    if alone and isinstance(parallel, nn.parallel.DistributedDataParallel):
        return parallel.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def _validate(model: nn.Module, valid: Samples, rank: int, world_size: int, device: torch.device) -> dict[str, float]:
    """Loss, accuracy and calibration over all validation images, each counted once whatever the number of workers."""
    model.eval()
    own = np.arange(rank, len(valid), world_size)
    parts = [own[start : start + EVAL_BATCH_SIZE] for start in range(0, len(own), EVAL_BATCH_SIZE)]
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, count
    kept: list[Batch] = []
    for part, (inputs, targets) in zip(parts, valid.batches(parts, epoch=0), strict=True):
        logits, targets = _logits(model, inputs.to(device)).float(), targets.to(device)
        first = int((part < calibration.MAX_IMAGES).sum())
        kept.append((logits[:first], targets[:first]))
        sums[0] += nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums[1] += (logits.argmax(1) == targets).sum()
        sums[2] += len(targets)
    loss, correct, count = reduced(sums).tolist()
    none = torch.zeros(0, 1, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    logits, targets = (torch.cat(tensors) for tensors in zip(*(kept or [none]), strict=True))
    found = calibration.calibrate(logits, targets, reduced)
    return {"valid_loss": loss / count, "valid_accuracy": correct / count, **found}


def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    outputs = model(inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def reduced(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all workers."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def _all_equal(number: int) -> bool:
    """Whether all workers call this with the same number, of less than 63 bits."""
    if not dist.is_initialized():
        return True
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    least_and_most = torch.tensor([number, -number], device=device)
    dist.all_reduce(least_and_most, dist.ReduceOp.MIN)
    return int(least_and_most[0]) == -int(least_and_most[1])


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
