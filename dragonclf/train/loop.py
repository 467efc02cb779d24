"""The training loop that every worker runs: data-parallel epochs, reduced metrics, a checkpoint each epoch.

Sums and counts are reduced over the workers, then divided: uneven last batches weigh by their images, and every worker acts on the
same numbers.
"""

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from dragonclf.train import calibration, checkpoint, thresholds
from dragonclf.train.data import Batch, Samples
from dragonclf.train.group import all_equal, reduced, share_buffers
from dragonclf.train.recipe import Recipe, freeze
from dragonclf.train.trainer import Done, Trainer, logits_of

EVAL_BATCH_SIZE = 64


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

    `wrap` makes the model data-parallel; `report` gets each epoch's metrics, equal on every worker. ValueError if the loss stops
    being finite, or if a GPU's memory is too small.
    """
    trainer = Trainer(model, train, recipe, rank=rank, world_size=world_size, device=device)
    done = trainer.resume(checkpoint.load_agreed(run_uri, all_equal))
    if rank == 0 and trainer.history and checkpoint.read_results(run_uri) != trainer.history:
        checkpoint.write_results(run_uri, trainer.history, trainer.curve)  # killed between a checkpoint and its results
    if recipe.compile:
        model.compile()  # in place: names of weights stay
    parallel: nn.Module | None = None
    with checkpoint.Writer(run_uri) as writer:

        def save(state: dict[str, Any], *, best: bool = False) -> None:
            if rank == 0:
                writer.save(state, best=best)

        for epoch in range(done.epoch, recipe.total_epochs):
            if recipe.patience and checkpoint.since_best(trainer.history) >= recipe.patience:
                break
            if parallel is None or epoch == recipe.freeze_epochs:
                freeze(model, frozen=recipe.frozen(epoch), first=recipe.freeze_to)
                parallel = None  # its hooks go with it, before others come
                gc.collect()
                parallel = wrap(model)
            started_s = time.monotonic()
            try:
                loss, lr, waited_s = trainer.epoch(parallel, epoch, done, save)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"the GPU's memory is too small for {recipe.global_batch_size} images over {world_size} workers in "
                    f"{recipe.accumulate} parts: raise --accumulate or --num-workers, use --amp, or lower --global-batch-size or --size"
                ) from error
            trained_s = time.monotonic() - started_s
            done = Done(epoch + 1)
            validated, choices = _validate(trainer.result, valid, recipe, epoch, rank, world_size, device)
            row = {
                "epoch": epoch + 1,
                "train_loss": loss,
                **validated,
                "lr": lr,
            }
            times = {
                "seconds": round(time.monotonic() - started_s, 3),
                "waited": round(waited_s / trained_s, 4),
                "workers": world_size,
            }
            trainer.history.append(row | times)
            is_best = checkpoint.since_best(trainer.history) == 0
            save(trainer.state(done) | {"thresholds": choices}, best=is_best)
            report(row)


@torch.no_grad()
def _validate(
    model: nn.Module, valid: Samples, recipe: Recipe, epoch: int, rank: int, world_size: int, device: torch.device
) -> tuple[dict[str, float], list[thresholds.Choice]]:
    """Loss, accuracy and calibration over all validation images, each counted once whatever the number of workers; thresholds by class."""
    share_buffers(model)
    model.eval()
    own = np.arange(rank, len(valid), world_size)
    parts = [own[start : start + EVAL_BATCH_SIZE] for start in range(0, len(own), EVAL_BATCH_SIZE)]
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, count
    kept: list[Batch] = []
    every = -(-len(valid) // calibration.MAX_IMAGES)
    for part, (inputs, targets) in zip(parts, valid.batches(parts, epoch=0), strict=True):
        logits, targets = logits_of(model, inputs.to(device)).float(), targets.to(device)
        chosen = torch.from_numpy(part % every == 0).to(device)
        kept.append((logits[chosen], targets[chosen]))
        sums[0] += nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums[1] += (logits.argmax(1) == targets).sum()
        sums[2] += len(targets)
    loss, correct, count = reduced(sums).tolist()
    if not math.isfinite(loss):  # the epoch's last step did it: its loss was measured before
        raise ValueError(f"the loss of the validation images is {loss} after epoch {epoch + 1}: lower --lr")
    none = torch.zeros(0, 1, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    logits, targets = (torch.cat(tensors) for tensors in zip(*(kept or [none]), strict=True))
    found = calibration.calibrate(logits, targets, reduced)
    temperature = found["temperature"] if recipe.calibrate else 1.0
    choices = thresholds.choose(logits.double() / temperature, targets, reduced, recipe)
    if choices:
        found["valid_coverage"] = thresholds.coverage(choices)
    return {"valid_loss": loss / count, "valid_accuracy": correct / count, **found}, choices
