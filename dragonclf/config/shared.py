"""Options that several jobs share, by what they are about."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dragonclf import storage
from dragonclf.storage import globs

MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_S = 60.0
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter gigabyte of RGB


class Config(BaseModel):
    """What every job's options have in common: none that is unknown, none that changes, and addresses made absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator(
        "out", "source", "data", "model", "features", "run", "run_a", "run_b", "reference", check_fields=False
    )
    @classmethod
    def _resolve(cls, uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)


class RayConfig(Config):
    """Where a job runs."""

    address: str = Field(
        default="local",
        min_length=1,
        description="Which Ray: local starts a private one on this machine; auto joins the one here; or HOST:PORT.",
    )
    num_actors: int | None = Field(default=None, ge=1, description="Worker actors. None: as many as fit the cluster.")
    cpus_per_actor: int | None = Field(
        default=None, ge=1, description="CPUs of an actor. None: all of a node's, at most 8."
    )


class ListingConfig(Config):
    """Which of a source's objects a run is about. Part of what identifies the run."""

    include: list[str] = Field(
        default=[],
        description="Only keys that match: '*.jpg' (a name, in any folder), '2024/*.jpg' (from the source on), '**/cats/**', '{a,b}'. "
        "Repeatable.",
    )
    exclude: list[str] = Field(
        default=[], description="No keys that match, though they are included: 'tmp/' is all below tmp. Repeatable."
    )
    limit: int | None = Field(default=None, ge=1, description="Only the first of them, in the order of the listing.")
    sample: int | None = Field(
        default=None, ge=1, description="Only so many of them, drawn by a hash of the uri: equal inputs, equal samples."
    )
    sample_seed: int = Field(default=0, ge=0, description="Draws another sample.")

    @field_validator("include", "exclude")
    @classmethod
    def _check_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            globs.regex(pattern)
        return patterns

    @model_validator(mode="after")
    def _check_one_of(self) -> "ListingConfig":
        if self.limit is not None and self.sample is not None:
            raise ValueError("--limit and --sample exclude each other: give one")
        if self.sample is None and self.sample_seed:
            raise ValueError("--sample-seed draws nothing without --sample: give both")
        return self


class LimitsConfig(Config):
    """What is too much of an image: it becomes a row that says so."""

    max_image_bytes: int = Field(default=MAX_IMAGE_BYTES, ge=1, description="Bytes of an encoded image, at most.")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="Pixels of a decoded image, at most.")
    max_image_s: float = Field(
        default=MAX_IMAGE_S,
        gt=0,
        description="Seconds to decode an image, at most. What takes longer is ended, status timeout.",
    )


class RunConfig(Config):
    """What a run does about earlier runs, other drivers, and too many errors."""

    max_error_rate: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of images without a result past which a run, complete as it is, is not made the latest (exit code 5).",
    )
    new_run: bool = Field(
        default=False, description="Make a new run though the newest one is finished and its input has not changed."
    )
    at_least_once: bool = Field(
        default=False,
        description="Accept a store without conditional writes, where nothing keeps a second driver from writing over this one.",
    )
    max_actor_bytes: int | None = Field(
        default=None,
        ge=2**28,
        description="Memory of a worker process; past it the process is ended, and its images are decoded one by one. None: its share of "
        "the node's.",
    )


class ReadingConfig(RunConfig):
    """How a run reads images."""

    shard_images: int | None = Field(
        default=None, ge=1, description="Images per shard. None: 512, growing to 20,000 with the bucket."
    )
    retry_errors: bool = Field(
        default=False,
        description="Make a new run out of the newest one: try again what was missing, denied, timeout or decoder_crash, keep the rest.",
    )


class ExecutionConfig(Config):
    """How a model is run. `auto` is resolved once and said in the log."""

    runtime: Literal["auto", "torch", "inductor", "openvino"] = Field(
        default="auto",
        description="auto: torch on a GPU, OpenVINO on a CPU if it is installed, else torch. inductor: torch.compile, ready in a minute.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU if the cluster has one, else the CPU."
    )
    batch_size: int = Field(
        default=32, ge=1, description="Images per forward pass. Changes speed and memory, not results."
    )


class PrecisionConfig(Config):
    """How exactly a model is run."""

    precision: Literal["auto", "f32", "bf16", "fp16", "int8"] = Field(
        default="f32",
        description="Arithmetic of the model's body. f32 equals training; a lower one must have been proven by `export`, on this class of "
        "processor. auto: the fastest proven one, else f32.",
    )


class ViewsConfig(Config):
    """How often a model looks at an image."""

    tta: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Test-time augmentation: look at each image N times more, varied as in training (mirrored, for a head trained on "
        "features); a quarter of the probabilities is of the centre, the rest of the mean of these views. Takes N + 1 times as long.",
    )


class ScoringConfig(RayConfig, LimitsConfig, ExecutionConfig, PrecisionConfig, ViewsConfig, ReadingConfig):
    """What all that score images share."""

    model: str = Field(description="Model bundle: a folder or s3:// prefix.", json_schema_extra={"positional": True})
    out: str = Field(description="Folder or s3:// prefix for what is written.")


class LayoutConfig(Config):
    """What of the answers is written."""

    threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Add a column abstain: whether the confidence is less than this. None: than the model's own threshold of the class; no "
        "such column if it has none.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Write the K most probable classes (top_labels, top_probs) in place of all probabilities.",
    )
    columns: str | None = Field(
        default=None,
        description="Write only these of the row's own columns, separated by commas, beside uri, etag, status and error. None: all.",
    )


class BudgetConfig(Config):
    """How much a command may take."""

    price_per_worker_hour: float | None = Field(
        default=None, ge=0, description="What an hour of one worker costs, in any currency."
    )
    max_hours: float | None = Field(
        default=None,
        gt=0,
        description="Stop when the command has taken so long (exit code 7). The same command goes on where it stopped.",
    )
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="Stop when this command's workers have cost so much, by --price-per-worker-hour, likewise.",
    )

    @model_validator(mode="after")
    def _check_price(self) -> "BudgetConfig":
        if self.max_cost is not None and not self.price_per_worker_hour:
            raise ValueError("--max-cost needs --price-per-worker-hour, above 0")
        return self
