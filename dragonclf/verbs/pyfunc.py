"""A bundle as MLflow's generic Python model. MLflow keeps a copy of this file with each model and runs it to load one: no pickle.

The model takes a table with a column ``uri`` (files, s3:// objects, read with the rights of whoever runs it) or ``image`` (encoded
bytes), and gives a row for each: status, error, label, confidence, abstain if the model has thresholds, and prob_<class>, as
`dragonclf predict` does.
"""

from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas as pd
import torch
from mlflow.types import ColSpec, DataType, Schema

from dragonclf.config import LimitsConfig
from dragonclf.model import bundle, tta
from dragonclf.model.bundle import BundleInfo
from dragonclf.model.execution import resolve_execution
from dragonclf.verbs.predict import predict_images

BUNDLE = "bundle"  # MLflow's name of the folder


class BundleModel(mlflow.pyfunc.PythonModel):  # pyright: ignore[reportPrivateImportUsage]
    """Opens the bundle, canaries and all, by the fastest runtime that is installed; in f32."""

    def load_context(self, context: Any) -> None:
        loaded = bundle.load_bundle(context.artifacts[BUNDLE])
        execution = resolve_execution("auto", "auto", "f32", has_gpu=torch.cuda.is_available())
        self._predictor = tta.open_predictor(loaded, execution, num_views=0, num_threads=torch.get_num_threads())
        self._info = loaded.info

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  which is said to return nothing
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row for each of `model_input`. ValueError if it has neither column, or both."""
        columns = [name for name in ("uri", "image") if name in model_input and model_input[name].notna().any()]
        if len(columns) != 1:
            raise ValueError(f"give a column uri or a column image, and not both; the table has {list(model_input)}")
        rows = predict_images(self._predictor, self._info, model_input[columns[0]].tolist(), LimitsConfig())
        left_out = {"uri", "probs"} if self._info.thresholds else {"uri", "probs", "abstain"}
        answers = [
            {
                **row.model_dump(exclude=left_out),
                **{f"prob_{name}": row.probs.get(name) for name in self._info.classes},
            }
            for row in rows
        ]
        return pd.DataFrame(answers, index=model_input.index)


def signature(info: BundleInfo) -> mlflow.models.ModelSignature:
    """What the model takes and gives."""
    given = [ColSpec(DataType.string, "uri", required=False), ColSpec(DataType.binary, "image", required=False)]
    texts = [ColSpec(DataType.string, name, required=name == "status") for name in ("status", "error", "label")]
    numbers = [
        ColSpec(DataType.double, name, required=False)
        for name in ("confidence", *(f"prob_{name}" for name in info.classes))
    ]
    if info.thresholds:
        numbers.insert(1, ColSpec(DataType.boolean, "abstain", required=False))
    return mlflow.models.ModelSignature(inputs=Schema([*given]), outputs=Schema([*texts, *numbers]))


mlflow.models.set_model(BundleModel())
