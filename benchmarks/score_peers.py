"""Four ways to score a bucket, for the benchmarks beside this file. Each reads, decodes, resizes, runs a model and writes Parquet.

    python benchmarks/score_peers.py METHOD MODEL s3://BUCKET/PREFIX NUM_IMAGES OUT

METHOD is ours, ours-auto (the fastest precision that the bundle admits), plain, plain-bf16, ray, ray-uint8 or daft; MODEL is `mean` (no
model: what the host costs) or a bundle's folder. Prints one line of JSON; with a model, OUT.json then has the label of each image. Endpoint
and credentials are AWS's own variables. Ray's way is that of its guide "Working with images": read_images, map with torchvision's ToTensor
and Resize, map_batches with an actor, write_parquet. ray-uint8 is the same tuned: it resizes and moves bytes in place of floats, as all
others here do. Daft's is its documentation's: download, decode_image, resize, a class UDF, write_parquet.
"""

import asyncio
import functools
import json
import logging
import os
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

SIZE, SHORT, BATCH_SIZE = 224, 256, 32
NUM_CPUS = os.cpu_count() or 1
Predict = Callable[[np.ndarray], np.ndarray]  # (B, 3, S, S), uint8 or float32 in 0..1, to float (B, K)
Done = tuple[
    int, Callable[[], dict[str, int]]
]  # rows written; what tells the label of each key, read after the clock has stopped


def mean(pixels: np.ndarray) -> np.ndarray:
    """In place of a model, (B, 1)."""
    return pixels.mean(axis=(1, 2, 3))[:, None]


def eager(model: str, *, channels_last: bool, dtype: torch.dtype = torch.float32, as_floats: bool = False) -> Predict:
    """The bundle's network in plain PyTorch. `as_floats` says that pixels come scaled to 0..1."""
    if model == "mean":
        return mean
    from dragonclf.model import bundle
    from dragonclf.model.predictor import Network

    torch.set_num_threads(NUM_CPUS)
    loaded = bundle.load_bundle(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = Network(loaded.model, loaded.info.transform).eval().to(memory_format=layout)

    @torch.inference_mode()
    def predict(pixels: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(pixels * 255 if as_floats else pixels).to(memory_format=layout)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return network(batch)[0].float().softmax(dim=1).numpy()

    return predict


def resized(image: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W) to uint8 (3, SIZE, SIZE): the evaluation transform of most backbones."""
    return F.center_crop(F.resize(image, [SHORT], antialias=True), [SIZE, SIZE])


def keys_of(prefix: str) -> list[str]:
    import boto3

    parts = urllib.parse.urlsplit(prefix)
    pages = (
        boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=parts.netloc, Prefix=parts.path[1:] + "/")
    )
    return [entry.get("Key", "") for page in pages for entry in page.get("Contents", [])]


def plain(model: str, prefix: str, out: str, *, dtype: torch.dtype = torch.float32) -> Done:
    """No framework: obstore's GETs on an event loop, threads that decode, one thread that predicts, in channels_last."""
    from obstore.store import S3Store

    parts = urllib.parse.urlsplit(prefix)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    store = S3Store(parts.netloc, endpoint=endpoint, client_options={"allow_http": True})
    predict = eager(model, channels_last=True, dtype=dtype)
    keys = keys_of(prefix)
    decoders, runner, fetches = ThreadPoolExecutor(NUM_CPUS), ThreadPoolExecutor(1), asyncio.Semaphore(64)
    torch.set_num_threads(1 if model == "mean" else NUM_CPUS)

    def decode(data: bytes) -> np.ndarray:
        return resized(
            decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        ).numpy()

    async def one(key: str) -> np.ndarray:
        async with fetches:
            found = await store.get_async(key)
            data = bytes(await found.bytes_async())
        return await asyncio.get_running_loop().run_in_executor(decoders, decode, data)

    async def all_batches() -> np.ndarray:
        loop, waiting = asyncio.get_running_loop(), asyncio.Semaphore(4)

        async def batch(start: int) -> np.ndarray:
            async with waiting:
                pixels = np.stack(await asyncio.gather(*(one(key) for key in keys[start : start + BATCH_SIZE])))
                return await loop.run_in_executor(runner, predict, pixels)

        return np.concatenate(await asyncio.gather(*(batch(i) for i in range(0, len(keys), BATCH_SIZE))))

    probs = asyncio.run(all_batches())
    pq.write_table(pa.table({"key": keys, "prob": list(probs)}), f"{out}.parquet")
    return len(keys), lambda: dict(zip(keys, probs.argmax(axis=1).tolist(), strict=True))


def with_ray(model: str, prefix: str, out: str, *, as_floats: bool = True) -> Done:
    import pyarrow.fs
    import ray
    from torchvision import transforms

    as_documented = transforms.Compose([transforms.ToTensor(), transforms.Resize(SHORT), transforms.CenterCrop(SIZE)])

    class Model:
        def __init__(self) -> None:
            self.predict = eager(model, channels_last=False, as_floats=as_floats)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            return {"prob": self.predict(batch["image"]), "path": batch["path"]}

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        if as_floats:
            return {"image": as_documented(row["image"]).numpy(), "path": row["path"]}
        return {"image": resized(torch.from_numpy(row["image"]).permute(2, 0, 1)).numpy(), "path": row["path"]}

    endpoint = urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL"])
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint.netloc, scheme=endpoint.scheme)
    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    images = ray.data.read_images(prefix.removeprefix("s3://"), filesystem=filesystem, mode="RGB", include_paths=True)
    scored = images.map(transform).map_batches(
        Model,
        batch_size=BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=1),  # pyright: ignore[reportCallIssue]
    )
    scored.write_parquet(f"{out}-ray")
    table = pq.read_table(f"{out}-ray")
    return len(table), lambda: labels(table["path"].to_pylist(), table["prob"].to_pylist())


def with_daft(model: str, prefix: str, out: str) -> Done:
    import daft  # pyright: ignore[reportMissingImports]
    from daft.functions import decode_image as daft_decode  # pyright: ignore[reportMissingImports]
    from daft.functions import download, resize  # pyright: ignore[reportMissingImports]
    from daft.io import IOConfig, S3Config  # pyright: ignore[reportMissingImports]

    store = S3Config(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name=os.environ["AWS_REGION"], use_ssl=False,
        key_id=os.environ["AWS_ACCESS_KEY_ID"], access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    config = IOConfig(s3=store)

    @daft.udf(return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=BATCH_SIZE)
    class Model:
        def __init__(self) -> None:
            self.predict = eager(model, channels_last=False)

        def __call__(self, images: daft.Series) -> list[np.ndarray]:
            pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images.to_pylist()])
            return list(self.predict(np.ascontiguousarray(pixels)))

    bucket = urllib.parse.urlsplit(prefix).netloc
    frame = daft.from_pydict({"uri": [f"s3://{bucket}/{key}" for key in keys_of(prefix)]})
    image = resize(daft_decode(download(daft.col("uri"), io_config=config), mode="RGB"), SIZE, SIZE)
    probs = Model(daft.col("image"))  # pyright: ignore[reportCallIssue]  the decorator makes an expression of it
    scored = frame.with_column("image", image).with_column("prob", probs).exclude("image")
    scored.write_parquet(f"{out}-daft")
    table = pq.read_table(f"{out}-daft")
    return len(table), lambda: labels(table["uri"].to_pylist(), table["prob"].to_pylist())


def labels(uris: list[str], probs: list[Any]) -> dict[str, int]:
    return {
        uri.removeprefix("s3://").partition("/")[2]: int(np.argmax(prob)) for uri, prob in zip(uris, probs, strict=True)
    }


@dataclass(frozen=True)
class MeanTask:
    """Our engine with `mean` in the model's place."""

    uses_gpu: bool = False

    @property
    def limits(self) -> Any:
        from dragonclf.config import MAX_IMAGE_BYTES, MAX_IMAGE_S, MAX_PIXELS
        from dragonclf.engine.pipeline import Limits

        return Limits(MAX_IMAGE_BYTES, MAX_PIXELS, MAX_IMAGE_S)

    def work(self, run: Any, num_threads: int, max_bytes: int) -> Any:
        from dragonclf.engine.image_work import ImageWork

        torch.set_num_threads(1)
        return ImageWork(run, self, num_threads, max_bytes)

    def open(self, num_threads: int) -> Any:
        return MeanWorker()


class MeanWorker:
    batch_size, min_side = BATCH_SIZE, 2 * SHORT

    def new_batch(self) -> np.ndarray:
        return np.zeros((BATCH_SIZE, SIZE, SIZE, 3), np.uint8).transpose(0, 3, 1, 2)

    def read(self, data: bytes, picture: Any) -> tuple[dict[str, Any], np.ndarray]:
        return {}, resized(picture.pixels).numpy()

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"prob": mean(pixels)}

    def table(self, planned: pa.Table, result: Any) -> pa.Table:
        return pa.table(
            {
                "uri": planned["uri"], "etag": pa.array(result.etags, pa.string()), "status": result.statuses,
                "error": pa.array(result.errors, pa.string()), "prob": result.outputs["prob"][:, 0],
            }
        )  # fmt: skip


def ours(model: str, prefix: str, out: str, *, precision: Literal["f32", "auto"] = "f32") -> Done:
    from dragonclf.config import RayConfig, RunConfig, ScoreConfig
    from dragonclf.data import listing
    from dragonclf.engine import job, plan
    from dragonclf.verbs.score import score

    if model != "mean":
        count = score(ScoreConfig(model=model, source=prefix, out=f"{out}-ours", precision=precision)).counts["ok"]
        return count, lambda: our_labels(model, f"{out}-ours")
    done = job.run(
        f"{out}-ours", "mean", {}, lambda: plan.stage_plan(listing.list_rows(prefix)), MeanTask(),
        ray_config=RayConfig(), run_config=RunConfig(),
    )  # fmt: skip
    return done.manifest.counts["ok"], dict


def our_labels(model: str, out: str) -> dict[str, int]:
    from dragonclf import read_scores
    from dragonclf.model import bundle

    classes = bundle.load_bundle(model).info.classes
    rows = read_scores(out).to_table(columns=["uri", *(f"prob_{name}" for name in classes)]).to_pydict()
    uris = rows.pop("uri")
    return labels(uris, list(zip(*rows.values(), strict=True)))


METHODS: dict[str, Callable[[str, str, str], Done]] = {
    "ours": ours, "ours-auto": functools.partial(ours, precision="auto"), "plain": plain,
    "plain-bf16": functools.partial(plain, dtype=torch.bfloat16), "ray": with_ray,
    "ray-uint8": functools.partial(with_ray, as_floats=False), "daft": with_daft,
}  # fmt: skip


def jpegs(count: int) -> Iterator[bytes]:
    """JPEGs of 500 x 375 and about 80 kB: smooth shapes under fine noise."""
    import io

    from PIL import Image

    draw = np.random.default_rng(0)
    for _ in range(count):
        shapes = Image.fromarray(draw.integers(0, 256, (9, 12, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(shapes).astype(np.int16) + draw.normal(0, 13, (375, 500, 1)).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        yield buffer.getvalue()


def main() -> None:
    method, model, prefix, num_images, out = sys.argv[1:]
    started = time.perf_counter()
    count, label_of = METHODS[method](model, prefix, out)
    seconds = time.perf_counter() - started
    assert count == int(num_images), f"{method}: {count} rows for {num_images} images"
    print(json.dumps({"method": method, "images": count, "seconds": seconds}), flush=True)
    if model != "mean":
        Path(f"{out}.json").write_text(json.dumps(label_of()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
