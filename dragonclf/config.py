"""The options of every job, documented once: the command line, `jobs/` and the Python API are all made from these models.

A field's description is its ``--help``; its validation is the only one. Fields marked positional are arguments, the rest options.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dragonclf import storage
from dragonclf.storage import globs

MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_S = 60.0
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter gigabyte of RGB


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("out", "source", "data", "model", "features", "run_a", "run_b", check_fields=False)
    @classmethod
    def _resolve(cls, uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)


class RayConfig(_Config):
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


class ListingConfig(_Config):
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


class LimitsConfig(_Config):
    """What is too much of an image: it becomes a row that says so."""

    max_image_bytes: int = Field(default=MAX_IMAGE_BYTES, ge=1, description="Bytes of an encoded image, at most.")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="Pixels of a decoded image, at most.")
    max_image_s: float = Field(
        default=MAX_IMAGE_S,
        gt=0,
        description="Seconds to decode an image, at most. What takes longer is ended, status timeout.",
    )


class RunConfig(_Config):
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


class ExecutionConfig(_Config):
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


class PrecisionConfig(_Config):
    """How exactly a model is run."""

    precision: Literal["auto", "f32", "bf16", "fp16", "int8"] = Field(
        default="f32",
        description="Arithmetic of the model's body. f32 equals training; a lower one must have been proven by `export`, on this class of "
        "processor. auto: the fastest proven one, else f32.",
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


class ScoringConfig(RayConfig, LimitsConfig, ExecutionConfig, PrecisionConfig, ReadingConfig):
    """What all that score images share."""

    model: str = Field(description="Model bundle: a folder or s3:// prefix.", json_schema_extra={"positional": True})
    out: str = Field(description="Folder or s3:// prefix for what is written.")


class LayoutConfig(_Config):
    """What of the answers is written."""

    threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Add a column abstain: whether the confidence is less than this. None: no such column.",
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


class BudgetConfig(_Config):
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


class RecipeConfig(_Config):
    """How a network is trained."""

    epochs: int = Field(default=3, ge=1, description="Passes over the training images.")
    freeze_epochs: int = Field(
        default=1, ge=0, description="Passes before those that train the head alone, with no-precompute."
    )
    lr: float = Field(
        default=0.01,
        gt=0,
        description="Greatest learning rate of the one-cycle schedule. About 0.01 for the head, 0.001 for all.",
    )
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Each layer's learning rate as a share of that of the next one towards the head, with no-precompute.",
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="sgd has Nesterov's momentum of 0.9.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decay of the weights, not of biases and norms.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: each class weighs the same in the loss, however many images it has."
    )
    clip_grad: float | None = Field(default=None, gt=0, description="Greatest norm of the gradient. None: any.")
    global_batch_size: int = Field(default=64, ge=1, description="Images per step, over all workers together.")
    accumulate: int = Field(
        default=1, ge=1, description="Parts in which a worker does its images of a step: less memory, the same step."
    )
    amp: bool = Field(default=False, description="Run the network in bf16 by autocast; weights and steps stay in f32.")
    seed: int = Field(default=0, ge=0, description="Order of the images and augmentation.")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="Steps after which a checkpoint is written, beside that of each epoch."
    )
    calibrate: bool = Field(
        default=True, description="Scale the model's logits by the temperature that fits the validation images best."
    )
    weights: Literal["last", "best"] = Field(
        default="last", description="Epoch whose weights the model gets: best is by validation accuracy."
    )


class TrainConfig(RecipeConfig, RayConfig, ExecutionConfig, ReadingConfig):
    """Options of `train`."""

    data: str = Field(
        description="Snapshot, or the folder that `index` wrote (its newest).", json_schema_extra={"positional": True}
    )
    out: str = Field(description="Folder or s3:// prefix under which the run's folder is made.")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run's folder. None: made from the options, so that equal ones resume.",
    )
    arch: str = Field(default="tf_efficientnet_lite0", description="Architecture, by its name in timm.")
    pretrained: str = Field(
        default="auto",
        description="Weights of the backbone: package:NAME, a file or s3:// URI, hub, none (random). auto: an installed package, else hub.",
    )
    size: int | None = Field(
        default=None, ge=32, le=2048, description="Side of the input in pixels. None: the backbone's own."
    )
    precompute: bool = Field(
        default=True, description="Train the head on features computed once; no-precompute trains every layer."
    )
    num_workers: int = Field(default=1, ge=1, description="Training workers, each with one GPU if there are GPUs.")
    max_failures: int = Field(
        default=3, ge=0, description="Losses of workers that are survived, each from the last checkpoint."
    )
    synthetic_canaries: bool = Field(
        default=False,
        description="Put made-up pictures in the bundle instead of four validation images, where those may not be passed on.",
    )
    mlflow_uri: str | None = Field(
        default=None,
        description="MLflow tracking server or database. None: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.",
    )
    log_model: bool = Field(
        default=True, description="Keep a copy of the model in MLflow too, for mlflow.pyfunc.load_model."
    )

    @model_validator(mode="after")
    def _check_of_all_layers(self) -> "TrainConfig":
        for name in ("freeze_epochs", "layer_decay", "amp"):
            if self.precompute and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name.replace('_', '-')} is for training every layer: add --no-precompute")
        return self


class PredictConfig(ExecutionConfig, PrecisionConfig, LimitsConfig):
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


class DiffConfig(_Config):
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
