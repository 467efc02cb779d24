"""The options of every job, documented once: the command line, `jobs/` and the Python API are all made from these models.

A field's description is its ``--help``; its validation is the only one. Fields marked positional are arguments, the rest options.
"""

from dragonclf.config.shared import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_S,
    MAX_PIXELS,
    BudgetConfig,
    ExecutionConfig,
    LayoutConfig,
    LimitsConfig,
    ListingConfig,
    PrecisionConfig,
    RayConfig,
    ReadingConfig,
    RunConfig,
    ScoringConfig,
    ViewsConfig,
)
from dragonclf.config.training import (
    RecipeConfig,
    TrainConfig,
)
from dragonclf.config.verbs import (
    CompareConfig,
    DiffConfig,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    PredictConfig,
    QualityConfig,
    ReportConfig,
    RescoreConfig,
    ReviewConfig,
    ScoreCommandConfig,
    ScoreConfig,
)

__all__ = [
    "MAX_IMAGE_BYTES",
    "MAX_IMAGE_S",
    "MAX_PIXELS",
    "BudgetConfig",
    "CompareConfig",
    "DiffConfig",
    "EvaluateConfig",
    "ExecutionConfig",
    "ExportConfig",
    "IndexConfig",
    "LayoutConfig",
    "LimitsConfig",
    "ListingConfig",
    "PrecisionConfig",
    "PredictConfig",
    "QualityConfig",
    "RayConfig",
    "ReadingConfig",
    "RecipeConfig",
    "ReportConfig",
    "RescoreConfig",
    "ReviewConfig",
    "RunConfig",
    "ScoreCommandConfig",
    "ScoreConfig",
    "ScoringConfig",
    "TrainConfig",
    "ViewsConfig",
]
