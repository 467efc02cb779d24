"""`compare`: training runs side by side: options, figures, and what each has right that the first has wrong."""

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dragonclf import storage
from dragonclf.config import CompareConfig
from dragonclf.data import tables
from dragonclf.evaluate.comparison import Comparison, Flip, OptionValues, RunFigures, write_page
from dragonclf.evaluate.metrics import classification_metrics, counted_rows
from dragonclf.evaluate.paired import paired_difference, slice_differences
from dragonclf.model import bundle
from dragonclf.train import checkpoint
from dragonclf.verbs.run_pictures import EVALUATION

log = logging.getLogger("dragonclf")

PREDICTIONS = "predictions.parquet"
MAX_FLIPS = 20  # each way


@dataclass(frozen=True)
class _Predicted:
    """The images that a run's figures count, each once, with their uris as index."""

    rows: pd.DataFrame
    targets: np.ndarray  # int64 (N,)
    probs: np.ndarray  # float64 (N, K)

    @property
    def is_right(self) -> np.ndarray:
        return self.probs.argmax(axis=1) == self.targets

    @property
    def prob_of_truth(self) -> np.ndarray:
        return self.probs[np.arange(len(self.targets)), self.targets]

    def of(self, uris: pd.Index) -> "_Predicted":
        places = self.rows.index.get_indexer(uris)
        return _Predicted(self.rows.iloc[places], self.targets[places], self.probs[places])


@dataclass(frozen=True)
class _Run:
    """A finished training run."""

    uri: str
    info: bundle.BundleInfo
    version: str
    epochs: list[checkpoint.Row]
    predicted: _Predicted | None  # None: it was trained with --no-report

    @property
    def snapshot(self) -> str:
        return storage.name(self.info.snapshot)

    @property
    def epoch(self) -> int:
        """The epoch whose weights the model has, from 1."""
        since = checkpoint.since_best(self.epochs) if self.info.config.get("weights") == "best" else 0
        return len(self.epochs) - since


def compare(config: CompareConfig) -> Comparison:
    """Compare runs of `train` with the first. With `config.out`, compare.html is written there, over an earlier one; nothing else is.

    Figures and differences are of the validation images that all runs have predicted, with one label and the same content.

    Raises:
        ValueError: a run is not there or not finished, or its predictions are not as `train` writes them.
        StorageError: the store does not answer.
    """
    runs = [_open(uri) for uri in [config.reference, *config.runs]]
    names = _names([run.uri for run in runs])
    notes = _notes_of_runs(runs, names)
    with_predictions = {
        name: run.predicted for name, run in zip(names, runs, strict=True) if run.predicted is not None
    }  # fmt: skip
    common = _in_common(with_predictions, notes)
    for note in notes:
        log.warning("compare: %s", note)
    found = Comparison(
        reference=names[0], page=None, notes=notes, options=_options(runs, names),
        runs=[_figures(run, name, common.get(name)) for run, name in zip(runs, names, strict=True)], differences=[], slices=[], flips=[],
    )  # fmt: skip
    reference = common.get(names[0])
    if reference is not None and len(reference.rows):
        for name in [name for name in names[1:] if name in common]:
            _add_differences(found, reference, common[name], name)
    if config.out is not None:
        epochs = {name: run.epochs for name, run in zip(names, runs, strict=True)}
        found.page = write_page(found, config.out, epochs=epochs)
    return found


def _open(uri: str) -> _Run:
    uri = uri.removesuffix("/")
    model_uri = storage.join(uri, "model")
    epochs = checkpoint.read_results(uri)
    if not epochs or storage.stat(storage.join(model_uri, bundle.INFO)) is None:
        what = checkpoint.RESULTS if not epochs else f"model/{bundle.INFO}"
        raise ValueError(
            f"{uri} is no finished run of `train`: {what} is missing; give a folder that `train` wrote, or run its command to the end"
        )
    info, version = bundle.read_info(model_uri)
    predictions_uri = storage.join(uri, EVALUATION, PREDICTIONS)
    predictions = storage.get_if_exists(predictions_uri)
    predicted = None
    if predictions is not None:
        frame = tables.decode(predictions[0], predictions_uri).to_pandas()
        rows, targets, probs = counted_rows(frame, classes=info.classes)
        if not rows["uri"].is_unique:
            raise ValueError(f"{predictions_uri}: an image stands twice in it: run `train` again under another --name")
        predicted = _Predicted(rows.set_index("uri", drop=False), targets, probs)
    return _Run(uri, info, version, epochs, predicted)


def _names(uris: Sequence[str]) -> list[str]:
    """The folders' names; URIs if two are the same."""
    names = [storage.name(uri) for uri in uris]
    return names if len(set(names)) == len(names) else list(uris)


def _notes_of_runs(runs: list[_Run], names: list[str]) -> list[str]:
    notes = []
    for run, name in zip(runs, names, strict=True):
        if run.predicted is None:
            notes.append(
                f"{name} has no {EVALUATION}/{PREDICTIONS}: it is left out of figures and differences; run its command again without "
                "--no-report"
            )
    for what, values in (
        ("trained on different snapshots", [run.snapshot for run in runs]),
        ("of different classes", [", ".join(run.info.classes) for run in runs]),
    ):
        if len(set(values)) > 1:
            told = "; ".join(f"{name}: {_short(value)}" for name, value in zip(names, values, strict=True))
            notes.append(f"the runs are {what} ({told})")
    return notes


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"


def _in_common(predicted: dict[str, _Predicted], notes: list[str]) -> dict[str, _Predicted]:
    """The images in all runs, of one content and one label, in the order of their uris. Adds to `notes` what is left out."""
    if not predicted:
        return {}
    rows = [one.rows for one in predicted.values()]
    shared = functools.reduce(lambda a, b: a.intersection(b), (one.index for one in rows)).sort_values()
    if any(len(one) != len(shared) for one in rows):
        counts = ", ".join(f"{name} {len(one.rows):,}" for name, one in predicted.items())
        notes.append(
            f"the validation sets differ ({counts} images): only the {len(shared):,} in all of them are compared"
        )
    first = rows[0].loc[shared]
    replaced, relabelled = np.zeros(len(shared), bool), np.zeros(len(shared), bool)
    for other in (one.loc[shared] for one in rows[1:]):
        both_known = first["etag"].notna() & other["etag"].notna()
        replaced |= (both_known & (first["etag"] != other["etag"])).to_numpy(bool)
        relabelled |= (first["input_label"] != other["input_label"]).to_numpy(bool)
    for what, left_out in (("has another content", replaced), ("has another label", relabelled & ~replaced)):
        if left_out.any():
            notes.append(f"images left out, since one of the runs {what} for them: {int(left_out.sum()):,}")
    kept = shared[~(replaced | relabelled)]
    return {name: one.of(kept) for name, one in predicted.items()}


def _options(runs: list[_Run], names: list[str]) -> list[OptionValues]:
    """Options and package versions that differ."""
    tables_ = [
        {name: _text(value) for name, value in run.info.config.items()}
        | {f"{package} (package)": version for package, version in run.info.versions.items()}
        for run in runs
    ]
    options = dict.fromkeys(name for table in tables_ for name in table)
    values = {option: [table.get(option, "") for table in tables_] for option in options}
    return [
        OptionValues(option=option, values=dict(zip(names, given, strict=True)))
        for option, given in values.items()
        if len(set(given)) > 1
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _figures(run: _Run, name: str, common: _Predicted | None) -> RunFigures:
    figures: dict[str, Any] = dict.fromkeys(
        ("accuracy", "accuracy_interval", "auroc", "log_loss", "ece", "coverage", "accepted_accuracy")
    )
    if common is not None and len(common.rows):
        metrics = classification_metrics(common.targets, probs=common.probs, classes=run.info.classes)
        figures |= metrics.model_dump(include=set(figures))
        if "abstain" in common.rows:
            accepted = ~common.rows["abstain"].to_numpy(bool)
            figures["coverage"] = float(accepted.mean())
            figures["accepted_accuracy"] = float(common.is_right[accepted].mean()) if accepted.any() else None
    return RunFigures(
        run=name, uri=run.uri, model_version=run.version, snapshot=run.snapshot, num_epochs=len(run.epochs), epoch=run.epoch,
        metrics=run.info.metrics, num_own_images=None if run.predicted is None else len(run.predicted.rows),
        num_images=None if common is None else len(common.rows), **figures,
    )  # fmt: skip


def _add_differences(found: Comparison, reference: _Predicted, candidate: _Predicted, name: str) -> None:
    a, b = reference.is_right, candidate.is_right
    found.differences.append(paired_difference(a, b, run=name))
    # A run whose head was trained on features may lack columns that the other has.
    added = candidate.rows[[column for column in candidate.rows if column not in reference.rows]]
    rows = pd.concat([reference.rows, added], axis=1).reset_index(drop=True)
    found.slices.extend(slice_differences(rows, reference=a, candidate=b, run=name))
    change = candidate.prob_of_truth - reference.prob_of_truth
    for is_gain, flipped in ((True, b & ~a), (False, a & ~b)):
        places = np.flatnonzero(flipped)
        most_first = places[np.argsort(-np.abs(change[places]), kind="stable")][:MAX_FLIPS]
        found.flips.extend(
            Flip(
                run=name, is_gain=is_gain, uri=reference.rows["uri"].iloc[place], actual=reference.rows["input_label"].iloc[place],
                label_reference=reference.rows["label"].iloc[place], label=candidate.rows["label"].iloc[place],
                prob_reference=float(reference.prob_of_truth[place]), prob=float(candidate.prob_of_truth[place]),
            )
            for place in most_first
        )  # fmt: skip
