"""The steps of training: a model, its optimizer, its average, and where in the run they are.

A run that was stopped anywhere and goes on comes to the same bits as one that was not, on a CPU, with the same number of workers.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from dragonclf.train.checkpoint import Row
from dragonclf.train.data import Batch, Samples
from dragonclf.train.group import reduced
from dragonclf.train.order import Order
from dragonclf.train.recipe import Recipe, set_lr

POINTS = 100  # of the curve of losses, an epoch: more say no more


@dataclass(frozen=True)
class Done:
    """How far a run has come: whole epochs, and of the next one the sum over all workers of the losses of each step that is done."""

    epoch: int
    losses: tuple[float, ...] = ()

    @property
    def step(self) -> int:
        return len(self.losses)


class Trainer:
    """Takes the steps of a recipe. All workers have one, with equal weights after each step.

    `history` has a row for each finished epoch, `curve` up to `POINTS` of each: epoch, step (of the run), lr, loss.
    """

    def __init__(
        self, model: nn.Module, train: Samples, recipe: Recipe, *, rank: int, world_size: int, device: torch.device
    ):
        self._model = model.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._train, self._recipe = train, recipe
        self._rank, self._world_size, self._device = rank, world_size, device
        self.order = Order(len(train), recipe.global_batch_size, recipe.seed)
        self._optimizer = recipe.new_optimizer(model)
        self._average = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self._loss = recipe.new_loss(train.targets, device)
        self._mix = recipe.new_mix(model)
        self._waited_s = 0.0
        self.history: list[Row] = []
        self.curve: list[Row] = []

    @property
    def result(self) -> nn.Module:
        """What the run gives so far: the average of the weights if there is one, else the weights."""
        return self._average.module if self._average else self._model

    def resume(self, state: dict[str, Any] | None) -> Done:
        if state is None:
            return Done(0)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average:
            self._average.module.load_state_dict(state["average"])
        self.history, self.curve = state["history"], state["curve"]
        return Done(state["epoch"], tuple(state["losses"]))

    def state(self, done: Done) -> dict[str, Any]:
        """All that the next step depends on. Augmentation, order and dropout are functions of the seed and the place, and not in it."""
        return {
            "epoch": done.epoch, "step": done.step, "losses": list(done.losses), "model": self._model.state_dict(),
            "average": self._average.module.state_dict() if self._average else None,
            "optimizer": self._optimizer.state_dict(), "history": self.history, "curve": self.curve,
        }  # fmt: skip

    def epoch(
        self, parallel: nn.Module, epoch: int, done: Done, save: Callable[[dict[str, Any]], None]
    ) -> tuple[float, float, float]:
        """Mean loss of the epoch's images over all workers, the head's last learning rate, and the seconds spent waiting for data here.

        `save` gets the state every `checkpoint_every` steps. The curve has the epoch then. ValueError if a loss is not finite.
        """
        recipe, num_steps, waited_s = self._recipe, self.order.num_steps, self._waited_s
        sums = torch.zeros(num_steps, dtype=torch.float64, device=self._device)
        if self._rank == 0:
            sums[: done.step] = torch.tensor(done.losses, dtype=torch.float64)

        def lr_at(step: int) -> float:
            return recipe.lr_at(epoch, step, num_steps=num_steps)

        def losses(count: int) -> list[float]:
            found = reduced(sums[:count].clone()).tolist()
            for step, loss in enumerate(found):
                if not math.isfinite(loss):  # such a state is not worth keeping
                    raise ValueError(
                        f"the loss is {loss} at step {step + 1} of epoch {epoch + 1}, at a learning rate of {lr_at(step):.2g}: lower --lr"
                    )
            return found

        for place, loss in self.steps(parallel, epoch, first=done.step, lr_at=lr_at):
            sums[place - 1] = loss
            if recipe.checkpoint_every and place % recipe.checkpoint_every == 0 and place < num_steps:
                save(self.state(Done(epoch, tuple(losses(place)))))
        found = losses(num_steps)
        self.curve += self._points(epoch, found, lr_at)
        return math.fsum(found) / self.order.num_samples, lr_at(num_steps - 1), self._waited_s - waited_s

    def steps(
        self, parallel: nn.Module, epoch: int, *, first: int, lr_at: Callable[[int], float]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Take an epoch's steps from `first` on; yield after each how many are done and the sum of the losses of this worker's images."""
        recipe, order = self._recipe, self.order
        recipe.train_mode(self._model)
        own = order.batches(epoch, rank=self._rank, world_size=self._world_size)
        micro = [part for batch in own[first:] for part in np.array_split(batch, recipe.accumulate)]
        # A worker without an image in a short last step still joins it, with one of its images at weight 0: all-reduce waits for everyone.
        filler = own[0][:1] if len(own[0]) else np.zeros(1, np.int64)
        batches = self._train.batches([part if len(part) else filler for part in micro], epoch=epoch)
        weights = (float(len(part) > 0) for part in micro)
        for step in range(first, order.num_steps):
            torch.manual_seed(_draw(recipe.seed, epoch, step, self._rank))  # dropout, and what is blended
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
            if self._average:
                self._average.update(self._model, step=epoch * order.num_steps + step + 1)
            yield step + 1, total

    def _points(self, epoch: int, losses: list[float], lr_at: Callable[[int], float]) -> list[Row]:
        """An epoch's part of the curve: the mean loss of the images of runs of steps."""
        points = []
        for steps in np.array_split(np.arange(len(losses)), min(POINTS, len(losses))):
            count = sum(self.order.global_count(int(step)) for step in steps)
            last = int(steps[-1])
            loss = math.fsum(losses[step] for step in steps) / count
            points.append({"epoch": epoch + 1, "step": epoch * len(losses) + last + 1, "lr": lr_at(last), "loss": loss})
        return points

    def _next(self, batches: Iterator[Batch]) -> Batch:
        started_s = time.monotonic()
        batch = next(batches)
        self._waited_s += time.monotonic() - started_s
        return batch

    def _sum_of_losses(self, parallel: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        if self._mix:
            inputs, targets = self._mix(inputs, targets)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.amp):
            logits = logits_of(parallel, inputs)
        return self._loss(logits, targets)


def logits_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Logits (N, K): networks give features too."""
    outputs = model(inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _draw(*place: int) -> int:
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def _alone(parallel: nn.Module, *, alone: bool) -> contextlib.AbstractContextManager[None]:
    """Leave gradients where they are, for the step's last part to sum over the workers."""
    if alone and isinstance(parallel, nn.parallel.DistributedDataParallel):
        return parallel.no_sync()
    return contextlib.nullcontext()
