"""Pictures of a training run show what training had: the batch as it was, the rows of results.csv."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dragonclf.evaluate.galleries import image_bytes
from dragonclf.train import pictures

COLOURS = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [10, 10, 10]], dtype=torch.uint8)


class Squares:
    """Samples of one colour each, in two classes."""

    targets = torch.tensor([0, 1, 0, 1, 0])
    num_read = 0

    def __len__(self) -> int:
        return 5

    def batches(self, indices, *, epoch):
        for batch in indices:
            self.num_read += len(batch)
            index = torch.from_numpy(batch)
            yield COLOURS[index][:, :, None, None].expand(-1, -1, 32, 32), self.targets[index]


def test_the_first_batch_is_drawn_once_and_training_gets_what_it_would_get(tmp_path: Path):
    samples, uri = Squares(), str(tmp_path / "train_batch0.jpg")
    seen = pictures.FirstBatch(samples, ["cat", "dog"], uri)
    order = [np.array([3, 0, 4]), np.array([1, 2])]
    later = list(seen.batches(order, epoch=1))
    assert not Path(uri).exists()
    first = list(seen.batches(order, epoch=0))
    drawn = Path(uri).read_bytes()
    assert samples.num_read == 10
    for batches in (first, later):
        for (pixels, targets), (wanted, classes) in zip(batches, samples.batches(order, epoch=0), strict=True):
            assert torch.equal(pixels, wanted)
            assert torch.equal(targets, classes)
    assert (len(seen), seen.targets.tolist()) == (5, [0, 1, 0, 1, 0])
    list(seen.batches(order[::-1], epoch=0))
    assert Path(uri).read_bytes() == drawn

    picture = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")).astype(int)
    row, middles = picture[picture.shape[0] // 2], (np.array([0.5, 1.5, 2.5]) * picture.shape[1] / 4).astype(int)
    assert np.abs(row[middles] - COLOURS[[3, 0, 4]].numpy()).max() < 40  # JPEG


def test_every_image_has_its_label():
    figure = pictures.draw_images(
        torch.zeros(18, 3, 8, 8, dtype=torch.uint8), [f"class {i} of $many$ {'x' * 20}" for i in range(18)]
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"class {i} of $many$ {'x' * 20}"[:25] + "…" for i in range(16)]
    assert image_bytes(figure).startswith(b"\x89PNG")


def test_curves_are_the_rows_of_results_and_of_steps():
    rows = [
        {"epoch": 1.0, "train_loss": 0.7, "valid_loss": 0.6, "valid_accuracy": 0.5, "lr": 0.01},
        {"epoch": 2.0, "train_loss": 0.4, "valid_loss": 0.5, "valid_accuracy": 0.75, "lr": 0.001},
    ]
    curve = [
        {"epoch": 1.0 + step // 4, "step": step + 1.0, "lr": 0.1 * step, "loss": 1 / (step + 1)} for step in range(8)
    ]
    lines = {line.get_label(): line for axes in pictures.plot_results(rows, curve).axes for line in axes.lines}
    wanted = {
        name.replace("_", " "): [row[name] for row in rows] for name in ("train_loss", "valid_loss", "valid_accuracy")
    }
    for name, values in wanted.items():
        line = lines.pop(name)
        assert np.asarray(line.get_xdata()).tolist() == [1, 2]
        assert np.asarray(line.get_ydata()).tolist() == values
    for name, key in (("train loss of steps", "loss"), ("learning rate of the head", "lr")):
        line = lines.pop(name)
        assert np.asarray(line.get_xdata()).tolist() == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
        assert np.asarray(line.get_ydata()).tolist() == [row[key] for row in curve]
    assert not lines
