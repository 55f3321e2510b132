"""Trains the model, and writes model.onnx, example.json, training.json and test.parquet.

    python train.py --out build

Replace it by your own training; the workflow wants these four files and nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from skl2onnx import to_onnx
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder; made where missing")
    parser.add_argument("--strength", type=float, default=1.0, help="inverse of the penalty")
    given = parser.parse_args()
    x, y = load_breast_cancer(return_X_y=True)
    x = x.astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, random_state=SEED, stratify=y)

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=given.strength))
    pipeline.fit(train_x, train_y)
    # Probabilities as one tensor, and not as a map for each row, which no protocol can carry.
    network = to_onnx(pipeline, train_x[:1], options={"zipmap": False}, target_opset=17)

    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "model.onnx").write_bytes(network.SerializeToString())
    _write_json(given.out / "example.json", {"X": test_x[:4].tolist()})
    auc = float(roc_auc_score(test_y, pipeline.predict_proba(test_x)[:, 1]))
    _write_json(given.out / "training.json", {"test_auc": auc, "strength": given.strength})
    # Rows that no version was trained on, with what came true.
    columns = {f"x{number:02}": test_x[:, number] for number in range(test_x.shape[1])}
    pd.DataFrame(columns | {"benign": test_y}).to_parquet(given.out / "test.parquet")
    print(f"AUC on {len(test_y)} rows that were held out: {auc:.4f}")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main()
