"""The numbers of a training run, and what follows from them: phases, learning rates, the optimizer, the loss."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from timm.models import group_parameters  # pyright: ignore[reportPrivateImportUsage]
from timm.optim import (  # pyright: ignore[reportPrivateImportUsage]
    param_groups_layer_decay,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_weight_decay,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import nn

from dragonclf.data.augment import Augment
from dragonclf.model.predictor import Network
from dragonclf.train.mix import Mix, new_mix

WARM_UP = 0.3  # share of a phase's steps
AFTER_FROZEN = 0.5  # of the learning rate, once the head is no longer trained alone (fastai's fine_tune)
FULL_SIZE_FROM = 2 / 3  # of the epochs on, images have their full size, where they grow
SIZE_STEP = 32  # pixels: networks halve their input five times


class Recipe(BaseModel):
    """The numbers of a training run."""

    augment: Augment = Augment()
    epochs: int
    freeze_epochs: int = 0
    freeze_to: int = 0
    lr: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    batch_norm: Literal["frozen", "train", "sync"] = "frozen"
    ema: float | None = None
    patience: int | None = None
    start_size: int | None = None
    clip_grad: float | None = None
    amp: bool = False
    compile: bool = False
    global_batch_size: int
    accumulate: int = 1
    checkpoint_every: int | None = None
    calibrate: bool = True
    min_precision: float | None = None
    min_recall: float | None = None
    seed: int

    @property
    def total_epochs(self) -> int:
        return self.freeze_epochs + self.epochs

    def frozen(self, epoch: int) -> bool:
        """Whether only the head is trained in an epoch, 0 the first."""
        return epoch < self.freeze_epochs

    def lr_at(self, epoch: int, step: int, *, num_steps: int) -> float:
        """The head's learning rate at a step of an epoch of `num_steps`: a cycle while the rest is frozen, then one half as high."""
        if self.frozen(epoch):
            return self.lr * one_cycle(epoch * num_steps + step, total_steps=self.freeze_epochs * num_steps)
        height = AFTER_FROZEN if self.freeze_epochs else 1.0
        step += (epoch - self.freeze_epochs) * num_steps
        return self.lr * height * one_cycle(step, total_steps=self.epochs * num_steps)

    def size_at(self, epoch: int, size: int) -> int:
        """Side of the training images in an epoch: from `start_size` evenly up to `size`, which the last third of the epochs has."""
        if self.start_size is None or self.start_size >= size:
            return size
        place = min(1.0, epoch / max(1.0, self.total_epochs * FULL_SIZE_FROM))
        grown = self.start_size + place * (size - self.start_size)
        return size if place == 1 else min(size, SIZE_STEP * round(grown / SIZE_STEP))

    def train_mode(self, model: nn.Module) -> None:
        """Dropout on; BatchNorm keeps its pretrained statistics if `batch_norm` says so.

        If not it learns them from the first epoch on, the head alone being trained: else all it has learnt is wrong when the rest follows.
        """
        model.train()
        if self.batch_norm == "frozen":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def new_mix(self, model: nn.Module) -> Mix | None:
        """What blends a batch for `model`; None: nothing does."""
        return (
            new_mix(model.head.out_features, mixup=self.mixup, cutmix=self.cutmix)
            if isinstance(model, Network)
            else None
        )

    def new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of all parameters, in groups with an ``lr_scale``: the layer decay to the power of the distance from the head.

        Nothing of one dimension (biases, norms) decays.
        """
        if isinstance(model, Network):
            groups = param_groups_layer_decay(model.model, self.weight_decay, layer_decay=self.layer_decay)
        else:
            groups = [{**group, "lr_scale": 1.0} for group in param_groups_weight_decay(model, self.weight_decay)]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.lr)

    def new_loss(
        self, targets: torch.Tensor, device: torch.device
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Sum over a batch of the cross-entropy of logits (N, K) and classes (N,), or shares of classes (N, K).

        With `class_weights` "balanced" each class weighs the same over all training samples, whose classes are `targets` (int64), and
        a sample weighs 1 on average.
        """
        weight = None
        if self.class_weights == "balanced":
            counts = targets.bincount()
            weight = (len(targets) / (len(counts) * counts)).to(device, torch.float32)

        def loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(
                logits.float(), classes, weight=weight, label_smoothing=self.label_smoothing, reduction="sum"
            )

        return loss


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def freeze(model: nn.Module, *, frozen: bool, first: int = 0) -> None:
    """Let gradients reach the head alone, or also the groups of layers from `first` on: 0 is everything, -1 the last group."""
    if isinstance(model, Network):
        trained = layers_from(model.model, first)
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad_(not frozen and name in trained)
        for parameter in model.head.parameters():
            parameter.requires_grad_(True)


def layers_from(model: nn.Module, first: int) -> set[str]:
    """Names of the parameters of a timm model from a group of layers on. The groups are timm's coarse ones: stem, stages, head.

    ValueError if there is no such group.
    """
    if first == 0:  # also of models without groups
        return {name for name, _ in model.named_parameters()}
    matcher = model.group_matcher(coarse=True)  # pyright: ignore[reportCallIssue]
    groups: dict[str, Any] = group_parameters(model, matcher, reverse=True)  # name -> number
    count = max(groups.values()) + 1
    if not -count <= first < count:
        raise ValueError(
            f"--freeze-to {first}: the layers are in {count} groups, 0 the stem, {count - 1} or -1 the head's"
        )
    return {name for name, group in groups.items() if group >= first % count}


def one_cycle(step: int, *, total_steps: int) -> float:
    """Share of the greatest learning rate at a step: cosine up from 1/25 over the first 30 %, cosine down to 0 (Smith's 1cycle, as fastai).

    Taken at the middle of each step, so that the shortest runs learn too.
    """
    place = min((step + 0.5) / total_steps, 1.0)
    if place < WARM_UP:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * place / WARM_UP)) / 2
    return (1 + math.cos(math.pi * (place - WARM_UP) / (1 - WARM_UP))) / 2
