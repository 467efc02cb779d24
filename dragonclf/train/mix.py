"""Mixup and CutMix: batches whose images are blends of two, and whose targets are so too. torchvision's, for network inputs.

H. Zhang et al., https://arxiv.org/abs/1710.09412, and S. Yun et al., https://arxiv.org/abs/1905.04899. They draw from torch's own
generator, which the caller seeds; images are blended with others of the same worker's part of a step.
"""

from collections.abc import Callable

import torch
from torchvision.transforms import v2

Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def new_mix(num_classes: int, *, mixup: float, cutmix: float) -> Mix | None:
    """What blends pixels (N, 3, S, S) and classes int64 (N,) to the same shape and shares of classes float32 (N, K); None: nothing does.

    `mixup` and `cutmix` are the alphas of their Beta distributions, 0 for not at all; of both, one is drawn each time.
    """
    ways: list[Mix] = []
    if mixup:
        blend = v2.MixUp(alpha=mixup, num_classes=num_classes)
        ways.append(lambda pixels, classes: blend(pixels.float(), classes))
    if cutmix:
        ways.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    if not ways:
        return None
    return lambda pixels, classes: ways[int(torch.randint(len(ways), ()))](pixels, classes)
