"""Fine-tune an image classifier on a Ray cluster from a bucket of labelled images, and score whole buckets with it."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dragonclf.learner import ImageData, Learner

__all__ = ["ImageData", "Learner"]
__version__ = metadata.version("dragonclf")


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `dragonclf --help` need not wait for torch and Ray."""
    if name in __all__:
        from dragonclf import learner

        return getattr(learner, name)
    raise AttributeError(f"module 'dragonclf' has no attribute {name!r}")
