"""Fine-tune an image classifier on a Ray cluster from a bucket of labelled images, and score whole buckets with it."""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dragonclf.learner import ImageData, Learner
    from dragonclf.scores import read_scores

__all__ = ["ImageData", "Learner", "read_scores"]
_MODULES = {"ImageData": "learner", "Learner": "learner", "read_scores": "scores"}
__version__ = metadata.version("dragonclf")


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `dragonclf --help` need not wait for torch and Ray."""
    if name in __all__:
        return getattr(importlib.import_module(f"dragonclf.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'dragonclf' has no attribute {name!r}")
