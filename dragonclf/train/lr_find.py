"""The learning-rate finder: how the loss falls as the rate grows from step to step, on a copy of the model.

L. Smith, "Cyclical learning rates for training neural networks", https://arxiv.org/abs/1506.01186, with fastai's numbers and suggestions.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from pydantic import BaseModel, Field
from torch import nn

from dragonclf import storage
from dragonclf.train.data import Samples
from dragonclf.train.group import reduced
from dragonclf.train.recipe import Recipe, freeze
from dragonclf.train.trainer import Trainer

FOUND = "lr_find.json"
LEAST_LR, MOST_LR, NUM_STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.98
DIVERGED = 4.0  # times the least smoothed loss
MIN_STEPS = 10  # fewer say nothing


class Sweep(BaseModel):
    """What a sweep came to."""

    lrs: list[float] = Field(description="The head's learning rate at each step.")
    losses: list[float] = Field(description="Mean loss of the step's images over all workers, before the step.")
    smoothed: list[float] = Field(description="Exponential moving average of the losses, without bias.")
    valley: float = Field(
        description="Learning rate half way down the longest fall of the smoothed loss, fastai's valley()."
    )
    steep: float = Field(
        description="Where the smoothed loss falls steepest over the rate's logarithm, fastai's steep()."
    )


def find(
    model: nn.Module,
    train: Samples,
    recipe: Recipe,
    *,
    run_uri: str,
    rank: int,
    world_size: int,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module],
) -> float:
    """The rate to train with: the valley of a sweep that the run's folder keeps, as lr_find.json.

    A run that goes on takes the one it began with. Equal on all workers; `model` stays as it is. ValueError if the sweep tells nothing.
    """
    is_kept = rank == 0 and storage.stat(storage.join(run_uri, FOUND)) is not None
    if int(reduced(torch.tensor(int(is_kept), device=device))):
        return kept(run_uri).valley
    found = sweep(model, train, recipe, rank=rank, world_size=world_size, device=device, wrap=wrap)
    if rank == 0:
        storage.put(storage.join(run_uri, FOUND), found.model_dump_json(indent=1).encode())
    return found.valley


def kept(run_uri: str) -> Sweep:
    """The sweep that a run's folder keeps."""
    return Sweep.model_validate_json(storage.get(storage.join(run_uri, FOUND)))


def sweep(
    model: nn.Module,
    train: Samples,
    recipe: Recipe,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module],
) -> Sweep:
    """Train a copy of `model` for up to 100 steps as in the recipe's first epochs, at rates from 1e-7 to 10, until the loss diverges."""
    copied = copy.deepcopy(model)
    freeze(copied, frozen=recipe.frozen(0), first=recipe.freeze_to)
    trainer = Trainer(copied, train, recipe, rank=rank, world_size=world_size, device=device)
    lrs, losses, smoothed, average = [], [], [], 0.0
    for number, loss in _losses(trainer, wrap(copied)):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smooth = average / (1 - SMOOTHING ** (number + 1))
        if not math.isfinite(loss) or smooth > DIVERGED * min(smoothed, default=math.inf):
            break
        lrs.append(lr_at(number))
        losses.append(loss)
        smoothed.append(smooth)
    if len(lrs) < MIN_STEPS:
        raise ValueError(f"the loss diverges after {len(lrs)} steps of the learning-rate sweep: give --lr a number")
    return Sweep(lrs=lrs, losses=losses, smoothed=smoothed, valley=lrs[valley(smoothed)], steep=lrs[steep(smoothed)])


def lr_at(number: int) -> float:
    """The rate of a step, 0 the first: the same factor from each to the next."""
    return LEAST_LR * (MOST_LR / LEAST_LR) ** (number / (NUM_STEPS - 1))


def valley(losses: list[float]) -> int:
    """Place half way along the longest falling subsequence of `losses` (fastai's callback/schedule.py)."""
    longest = [1] * len(losses)  # of those that end at each place
    for i in range(len(losses)):
        longest[i] = 1 + max((longest[j] for j in range(i) if losses[i] < losses[j]), default=0)
    end = longest.index(max(longest))
    start = end - longest[end]
    third = (end - start) / 3
    return max(0, start + int(third) + int(third / 2))


def steep(losses: list[float]) -> int:
    """Place after which `losses`, at evenly spaced logarithms of the rate, fall most."""
    falls = [after - before for before, after in itertools.pairwise(losses)]
    return falls.index(min(falls))


def _losses(trainer: Trainer, parallel: nn.Module) -> Iterator[tuple[int, float]]:
    """Steps and the mean losses of their images, over as many epochs as they take."""
    order = trainer.order
    for epoch in range(math.ceil(NUM_STEPS / order.num_steps)):
        first = epoch * order.num_steps

        def lr(step: int, first: int = first) -> float:
            return lr_at(first + step)

        for place, loss in trainer.steps(parallel, epoch, first=0, lr_at=lr):
            if first + place > NUM_STEPS:
                return
            yield first + place - 1, float(reduced(loss)) / order.global_count(place - 1)
