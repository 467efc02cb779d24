"""Options of `train`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dragonclf.config import recipes
from dragonclf.config.shared import Config, ExecutionConfig, RayConfig, ReadingConfig

LR_OF_ALL_LAYERS = 0.001
# What means nothing for a head on features.
_OF_ALL_LAYERS = (
    "freeze_epochs", "freeze_to", "layer_decay", "amp", "mixup", "cutmix", "start_size", "drop", "drop_path", "batch_norm", "compile",
)  # fmt: skip
_OF_VIEWS = ("crop_scale", "flips", "policy", "erase")


class RecipeConfig(Config):
    """How a network is trained."""

    epochs: int = Field(default=3, ge=1, description="Passes over the training images.")
    freeze_epochs: int = Field(
        default=1, ge=0, description="Passes before those that train the head alone, with no-precompute."
    )
    freeze_to: int = Field(
        default=0,
        description="First group of layers that is trained, with no-precompute: 0 the stem, so all; then timm's stages; -1 the head's.",
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=0.01,
        description="Greatest learning rate of the one-cycle schedule, by default 0.01, and 0.001 with no-precompute. auto: found by a "
        "sweep.",
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
    crop_scale: float = Field(
        default=0.35,
        gt=0,
        le=1,
        description="Least share of the image that a random crop keeps, with no-precompute or views.",
    )
    flips: Literal["none", "horizontal", "vertical", "both"] = Field(
        default="horizontal", description="How images are mirrored at random, with no-precompute or views."
    )
    policy: Literal["none", "trivial", "rand"] = Field(
        default="none",
        description="trivial: TrivialAugment, one random change of shape or colour an image. rand: RandAugment, two mild ones. With "
        "no-precompute or views.",
    )
    erase: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of images of which a random part is erased, with no-precompute or views.",
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        description="Alpha by which pairs of images are blended, 0.2 say, with no-precompute. 0: not.",
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        description="Alpha by which a part of an image is pasted into another, 1 say, with no-precompute. 0: not.",
    )
    start_size: int | None = Field(
        default=None,
        ge=32,
        description="Side of the training images in the first epoch, in pixels; it grows to the full one over two thirds of the epochs. "
        "Quicker, with no-precompute. None: full from the start.",
    )
    drop: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the head, with no-precompute.")
    drop_path: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Stochastic depth: how often the last block is skipped, with no-precompute.",
    )
    batch_norm: Literal["frozen", "train", "sync"] = Field(
        default="frozen",
        description="frozen: BatchNorm keeps its pretrained statistics. train: it learns those of each worker's images; the result then "
        "depends on the number of workers. sync: of all workers' images (GPUs only). With no-precompute.",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Give the model the moving average of its weights, with this decay at most (0.999 say). None: the weights.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many epochs without a better validation accuracy; --weights best takes the best. None: train them all.",
    )
    compile: bool = Field(default=False, description="Compile the network by torch.compile, with no-precompute.")
    calibrate: bool = Field(
        default=True, description="Scale the model's logits by the temperature that fits the validation images best."
    )
    min_precision: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Give each class the least threshold from which at least this share of its labels on validation images are right; "
        "scored rows abstain below it. None: no thresholds.",
    )
    min_recall: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Give each class the greatest threshold from which at least this share of its validation images is found, likewise.",
    )
    weights: Literal["last", "best"] = Field(
        default="last", description="Epoch whose weights the model gets: best is by validation accuracy."
    )

    @model_validator(mode="after")
    def _check_one_goal(self) -> "RecipeConfig":
        if self.min_precision is not None and self.min_recall is not None:
            raise ValueError("--min-precision and --min-recall exclude each other: give one")
        return self


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
    recipe: str | None = Field(
        default=None,
        min_length=1,
        description="TOML file or s3:// URI with options in its table `train` (crop_pct = 1.0), or elpv-head or elpv-finetune, which come "
        "with this package. What is given beside it wins: --recipe elpv-finetune --epochs 5. A run's args.toml gives the same again.",
    )
    arch: str = Field(default="tf_efficientnet_lite0", description="Architecture, by its name in timm.")
    pretrained: str = Field(
        default="auto",
        description="Weights of the backbone: package:NAME, a file or s3:// URI, hub, none (random). auto: an installed package, else hub.",
    )
    size: int | None = Field(
        default=None, ge=32, le=2048, description="Side of the input in pixels. None: the backbone's own."
    )
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of an image's short side that the model sees; 1: all, where what matters reaches the edge. None: the backbone's "
        "own.",
    )
    precompute: bool = Field(
        default=True, description="Train the head on features computed once; no-precompute trains every layer."
    )
    views: int = Field(
        default=0,
        ge=0,
        description="Augmented views of each training image to compute features of, beside its own: epochs take its own, then each view, "
        "in turn. Each costs a pass of the backbone, and memory of every worker for all features once more.",
    )
    cache: bool = Field(
        default=True,
        description="Keep the images of a bucket on the training nodes' disks, so that each is read once, with no-precompute.",
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder on each node for them, shared by the runs there; a tenth of its disk stays free. None: the user's own in the "
        "temporary folder.",
    )
    num_workers: int = Field(default=1, ge=1, description="Training workers, each with one GPU if there are GPUs.")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Workers to go on with when nodes are lost; those that there is room for again join in a minute. None: num-workers.",
    )
    max_failures: int = Field(
        default=3, ge=0, description="Losses of workers that are survived, each from the last checkpoint."
    )
    report: bool = Field(
        default=True,
        description="Evaluate the model on the validation images at the end: report.html in the run's folder.",
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("recipe"), str) and given["recipe"]:
            given = recipes.read(given["recipe"], cls.model_fields).train | given
        # What suits a head destroys pretrained layers.
        return given if given.get("precompute", True) else {"lr": LR_OF_ALL_LAYERS} | given

    @model_validator(mode="after")
    def _check_workers(self) -> "TrainConfig":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"--min-workers {self.min_workers} is more than --num-workers {self.num_workers}")
        return self

    @model_validator(mode="after")
    def _check_of_all_layers(self) -> "TrainConfig":
        for name in _OF_ALL_LAYERS:
            if self.precompute and self._is_given(name):
                raise ValueError(f"--{name.replace('_', '-')} is for training every layer: add --no-precompute")
        return self

    @model_validator(mode="after")
    def _check_views(self) -> "TrainConfig":
        for name in _OF_VIEWS:
            if self.precompute and not self.views and self._is_given(name):
                raise ValueError(
                    f"--{name.replace('_', '-')} varies images, and features are computed of each as it is: add --views 3, say, or "
                    "--no-precompute"
                )
        if self.views and not self.precompute:
            raise ValueError(
                "--views is for features, and --no-precompute varies the images anew each epoch: leave one out"
            )
        if self.views >= self.epochs:
            raise ValueError(
                f"--views {self.views} is more than {self.epochs} epochs take, the first of which takes the images as they are: "
                "lower it, or raise --epochs"
            )
        return self

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default
