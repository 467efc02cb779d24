"""Options of every job but `train`."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dragonclf import storage
from dragonclf.config.shared import (
    BudgetConfig,
    Config,
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


class IndexConfig(RayConfig, ListingConfig, LimitsConfig, ReadingConfig):
    """Options of `index`."""

    source: str = Field(
        description="Folder or s3:// prefix with one folder per class (under train/ and valid/ if it likes), the manifest.json of an S3 "
        "Inventory of such a bucket, or a CSV or Parquet manifest with columns uri, label and optionally split, group.",
        json_schema_extra={"positional": True},
    )
    out: str = Field(description="Folder or s3:// prefix for the data set's snapshots.")
    valid_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of images for validation, where the source does not say."
    )
    seed: int = Field(default=0, ge=0, description="Draws the validation images.")
    corrections: list[str] = Field(
        default=[],
        description="CSV of corrected labels, as review.html makes it: uri, etag, old, new, reason. The old labels of a first file are the "
        "source's, those of a second what the first made. Repeatable.",
    )

    @field_validator("corrections")
    @classmethod
    def _resolve_corrections(cls, uris: list[str]) -> list[str]:
        return [storage.resolve(uri) for uri in uris]


class ScoreConfig(ScoringConfig, ListingConfig, LayoutConfig, BudgetConfig):
    """Options of `score`."""

    source: str = Field(
        description="Folder or s3:// prefix to score whole, the manifest.json of an S3 Inventory, or a CSV or Parquet manifest with a "
        "column uri.",
        json_schema_extra={"positional": True},
    )
    since: str | None = Field(
        default=None,
        pattern=r"^(latest|[0-9a-f]{12}-[0-9]{5})$",
        description="Keep the rows of objects that have not changed (same uri and etag) since an earlier published run of the same model: "
        "latest, or a run's name. Their images are not read. None: score all.",
    )
    embeddings: bool = Field(
        default=False, description="Also write what the head sees of each image (column features), for `rescore`."
    )

    @model_validator(mode="after")
    def _check_views(self) -> "ScoreConfig":
        if self.embeddings and self.tta:
            raise ValueError(
                f"--embeddings are of one view of an image, and --tta {self.tta} mixes the probabilities of several: leave one out"
            )
        return self


class ScoreCommandConfig(ScoreConfig):
    """Options of `score` on the command line."""

    estimate: bool = Field(
        default=False,
        description="Write nothing: score a sample and print what it all would take and cost.",
    )


class RescoreConfig(RayConfig, RunConfig, LayoutConfig):
    """Options of `rescore`."""

    model: str = Field(
        description="Model bundle whose head is applied: a folder or s3:// prefix.",
        json_schema_extra={"positional": True},
    )
    features: str = Field(
        description="Run that was scored with --embeddings, or the folder given as its --out (its newest run).",
        json_schema_extra={"positional": True},
    )
    out: str = Field(description="Folder or s3:// prefix for what is written.")


class EvaluateConfig(ScoringConfig):
    """Options of `evaluate`."""

    data: str = Field(
        description="Snapshot, or the folder that `index` wrote (its newest).", json_schema_extra={"positional": True}
    )
    split: Literal["train", "valid", "test"] = Field(default="valid", description="Which images to look at.")
    per_gallery: int = Field(default=8, ge=1, le=24, description="Pictures in each gallery of the report.")
    seed: int = Field(default=0, ge=0, description="Draws the random galleries.")


class PredictConfig(ExecutionConfig, PrecisionConfig, ViewsConfig, LimitsConfig):
    """Options of `predict`."""

    model: str = Field(description="Model bundle: a folder or s3:// prefix.", json_schema_extra={"positional": True})
    images: list[str] = Field(
        min_length=1, description="Image files or s3:// objects.", json_schema_extra={"positional": True}
    )


class ExportConfig(ExecutionConfig):
    """Options of `export`."""

    model: str = Field(description="Model bundle: a folder or s3:// prefix.", json_schema_extra={"positional": True})
    data: str = Field(
        description="Snapshot with validation images to prove it on, or the folder that `index` wrote (its newest).",
        json_schema_extra={"positional": True},
    )
    precision: Literal["bf16", "fp16", "int8"] = Field(description="What to prove.")
    images: int = Field(default=5_000, ge=1, description="Validation images to compare, at most.")
    calibration_images: int = Field(
        default=300, ge=32, le=5_000, description="Training images that set int8's ranges, at most."
    )


class DiffConfig(Config):
    """Options of `diff`."""

    run_a: str = Field(
        description="Published run of `score` or `evaluate`, or the folder given as its --out (its newest).",
        json_schema_extra={"positional": True},
    )
    run_b: str = Field(description="The run to compare with it, likewise.", json_schema_extra={"positional": True})
    out: str | None = Field(
        default=None,
        description="Folder or s3:// prefix for flips.parquet: every image whose label or status changed. None: only the summary.",
    )
    movers: int = Field(
        default=20, ge=0, le=10_000, description="Images to name, of those whose probabilities changed most."
    )


class ReviewConfig(Config):
    """Options of `review`."""

    run: str = Field(
        description="Published run of `evaluate` or `score`, or the folder given as its --out (its newest), or as that of `quality`.",
        json_schema_extra={"positional": True},
    )
    out: str = Field(description="Folder or s3:// prefix for review.html.")
    worst: int = Field(default=200, ge=1, le=2_000, description="Pictures to look at, at most.")
    by: Literal["loss", "uncertain", "random"] | None = Field(
        default=None,
        description="Which: loss, whose label the model thinks least probable; uncertain, where its two likeliest classes are closest; or "
        "random. None: loss where the run has labels, else uncertain.",
    )
    seed: int = Field(default=0, ge=0, description="Draws the random ones.")


class QualityConfig(Config):
    """Options of `quality`."""

    data: str = Field(
        description="Snapshot, or the folder that `index` wrote (its newest).", json_schema_extra={"positional": True}
    )
    out: str = Field(description="Folder or s3:// prefix for quality.parquet.")
    features: str | None = Field(
        default=None,
        description="Run of features that judges the labels, or the --out of a `train` whose backbone was frozen. None: labels are "
        "not judged.",
    )


class CompareConfig(Config):
    """Options of `compare`."""

    reference: str = Field(
        description="Folder of a run of `train`, with which the others are compared.",
        json_schema_extra={"positional": True},
    )
    runs: list[str] = Field(
        min_length=1,
        max_length=7,
        description="Folders of other runs, 7 at most.",
        json_schema_extra={"positional": True},
    )
    out: str | None = Field(default=None, description="Folder or s3:// prefix for compare.html. None: only the tables.")

    @field_validator("runs")
    @classmethod
    def _resolve_runs(cls, uris: list[str]) -> list[str]:
        return [storage.resolve(uri) for uri in uris]

    @model_validator(mode="after")
    def _check_once(self) -> "CompareConfig":
        seen = [uri.rstrip("/") for uri in (self.reference, *self.runs)]
        if twice := next((uri for uri in seen if seen.count(uri) > 1), None):
            raise ValueError(f"{twice} is given twice: give each run once")
        return self


class ReportConfig(Config):
    """Options of `report`."""

    run: str = Field(
        description="Published run of `score`, `rescore` or `evaluate`, or the folder given as its --out (its newest).",
        json_schema_extra={"positional": True},
    )
    out: str | None = Field(
        default=None,
        description="Folder or s3:// prefix for scoring.html. None: reports/RUN beside the folder runs/ that the run is in.",
    )
    model: str | None = Field(
        default=None,
        description="Model bundle that scored the run, where `train` wrote it: tells drift against its training and validation images.",
    )
    per_gallery: int = Field(default=8, ge=0, le=24, description="Pictures in each gallery. 0: no image is read.")
    seed: int = Field(default=0, ge=0, description="Draws the random galleries.")
