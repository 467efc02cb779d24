"""The notebook runs from its first cell to its last, on a few photographs, in a kernel as Jupyter starts it."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dragonclf.data.snapshot import open_snapshot
from dragonclf.model import bundle
from tests.integration import commands

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Jupyter's own, in this process

PATH = commands.ROOT / "notebooks" / "drogon_or_viserion.ipynb"
NUM_PLOTS = 12


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "SAMPLE": "60",
        "EPOCHS": "1",
        "PYTHONPATH": f"{commands.ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SOURCE", raising=False)
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == NUM_PLOTS
    printed = "".join(output.get("text", "") for output in outputs)
    # Which of the photographs are held out is a matter of where they are installed.
    made = open_snapshot(str(tmp_path / "dragonclf-runs" / "data")).info
    assert f"{sum(made.splits['valid'].values())} pictures, " in printed
    assert "four views: " in printed
    assert bundle.load_bundle(str(tmp_path / "dragons-model")).info.classes == ["defective", "functional"]
    run = next(path.parent for path in tmp_path.glob("dragonclf-runs/models/*/train_batch0.jpg"))
    assert {"args.toml", "results.csv", "results.png", "report.html", "confusion_matrix.png", "model"} <= {
        path.name for path in run.iterdir()
    }


def test_it_is_committed_without_outputs():
    for cell in nbformat.read(PATH, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert PATH.stat().st_size < 20_000
