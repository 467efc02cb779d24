"""Training workers: what the options come to for them, and how Ray Train starts them."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.train import Result
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy

from dragonclf import session, storage
from dragonclf.config import TrainConfig
from dragonclf.data.augment import Augment
from dragonclf.train import worker
from dragonclf.train.recipe import Recipe

MAX_CPUS_PER_WORKER = 8
# A step on a CPU asks for gigabytes and gives them back. glibc would return them to the kernel each time, and zero and map them again at
# the next: for tf_efficientnet_lite0 that is 60 % of the step. So it keeps them, in one arena.
# Threads of a step that wait for each other sleep: by default they spin, and keep the cores from those that decode.
ON_CPUS = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip
NO_MEMORY = "due to the node running low on memory"  # Ray's words
RESIZE_POLL_S = 30.0  # each resizing starts the workers anew
# How often Ray Train asks its workers how they fare, for which each waits at an epoch's end. Its own 2 s are longer than an epoch on
# features takes; so one worker is asked each tenth of a second where they are few.
WORKER_POLL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
WORKER_POLL_S, MOST_WORKER_POLL_S = 0.1, 2.0
# A process more, seconds to start, that looks out for nodes which a cluster takes away.
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def recipe(config: TrainConfig) -> Recipe:
    """What the options come to for the loop."""
    given = config.model_dump(include=set(Recipe.model_fields))
    given["augment"] = config.model_dump(include=set(Augment.model_fields))
    given["lr"] = 1.0 if config.lr == "auto" else config.lr  # auto: the workers find it
    return Recipe.model_validate(given | ({"freeze_epochs": 0} if config.precompute else {}))


def regularization(config: TrainConfig) -> dict[str, float]:
    """Dropout of the architecture, as timm names it."""
    return {"drop_rate": config.drop, "drop_path_rate": config.drop_path}


def cpus_per_worker(config: TrainConfig) -> int:
    """CPUs for each. ValueError if this machine has less than one."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if config.address == session.LOCAL and config.num_workers > cpus:
        raise ValueError(
            f"{config.num_workers} workers do not fit this machine's {cpus} CPUs: lower --num-workers, or join a cluster"
        )
    return max(1, min(MAX_CPUS_PER_WORKER, cpus // config.num_workers))


def run_workers(config: TrainConfig, job: worker.TrainJob) -> None:
    """Have the workers do the job, and begin anew where some are lost. ValueError and StorageError are those of a worker."""
    use_gpu = session.has_gpu(config.address) and config.device != "cpu"
    if config.batch_norm == "sync" and not use_gpu:
        raise ValueError("--batch-norm sync needs GPUs, as torch's SyncBatchNorm does: use train or frozen")
    if _fits_here(config, job, use_gpu=use_gpu):
        _run_here(job)
        return
    with tempfile.TemporaryDirectory(prefix="dragonclf-train-") as folder:
        trainer = _Trainer(
            worker.train_worker,
            train_loop_config={"job": job.model_dump_json()},
            scaling_config=ray.train.ScalingConfig(
                num_workers=(config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
                use_gpu=use_gpu,
                elastic_resize_monitor_interval_s=RESIZE_POLL_S,
                resources_per_worker={"CPU": job.num_threads} | ({"GPU": 1} if use_gpu else {}),
            ),
            # Ray Train keeps nothing that matters: checkpoints are our own. A name of its own each time, since it resumes by name.
            run_config=ray.train.RunConfig(
                name=f"dragonclf-{uuid.uuid4().hex}",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                worker_runtime_env={"env_vars": {} if use_gpu else ON_CPUS},
            ),
        )
        try:
            with _settings_of_ray_train(config):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error


def _fits_here(config: TrainConfig, job: worker.TrainJob, *, use_gpu: bool) -> bool:
    """Whether this process can be the one worker: a head on a CPU is learnt in less time than processes take to start."""
    return config.address == session.LOCAL and config.num_workers == 1 and job.features_uri is not None and not use_gpu


def _run_here(job: worker.TrainJob) -> None:
    """Do the job in this process, by Ray Train's local mode, and leave torch as it was."""
    num_threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            ray.train.torch.TorchTrainer(
                worker.train_worker,
                train_loop_config={"job": job.model_dump_json()},
                scaling_config=ray.train.ScalingConfig(num_workers=0),
            ).fit()
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _settings_of_ray_train(config: TrainConfig) -> Iterator[None]:
    """Those that it reads from the environment, unless they are there."""
    ours = {WORKER_POLL: str(min(MOST_WORKER_POLL_S, WORKER_POLL_S * config.num_workers))}
    if config.address == session.LOCAL:
        ours[PREEMPTION_WATCHER] = "0"
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to us: Ray's own handler ends the process with 0 or 1 and no word, and stays when training is over."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        policy = _Policy(given["failure_policy"].failure_config)
        return super()._initialize_and_run_controller(**given | {"failure_policy": policy})


class _Policy(DefaultFailurePolicy):
    """Tells at once what a user has to mend: the next try would end as the first one did."""

    def _is_retryable_error(self, training_failed_error: ray.train.TrainingFailedError) -> bool:
        return super()._is_retryable_error(training_failed_error) and not isinstance(
            _cause(training_failed_error), ValueError
        )


def _cause(error: BaseException) -> Exception:
    """The error of a worker as what it was there, if a user can act on it."""
    text = str(error)
    for kind, name in ((ValueError, "ValueError: "), (storage.StorageError, "Error: ")):
        lines = [line for line in text.splitlines() if name in line]
        if lines:
            return kind(lines[-1].rpartition(name)[2])
    if NO_MEMORY in text:
        return storage.StorageError(
            "training failed: a machine ran out of memory, and Ray ended its workers: end what else takes memory there, and the same "
            "command resumes; or begin another run with a larger --accumulate or a smaller --global-batch-size"
        )
    return storage.StorageError(
        f"training failed: {(text.strip().splitlines() or ['no reason given'])[-1]}; the same command resumes"
    )
