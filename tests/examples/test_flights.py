"""Two honest versions of one model: trained for real, pushed, served and asked."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayprism.core.tensors import Datatype
from rayprism.models.loader import load_model
from tests.examples.conftest import Pushed
from tests.examples.local_server import serve_version
from tests.examples.scripts import EXAMPLES, import_script, run_script


def test_both_versions_reproduce_their_example(flights: Pushed) -> None:
    assert flights.repository.versions("flights") == [1, 2]
    for number in (1, 2):
        model = load_model(flights.repository.version("flights", number))
        model.close()


def test_versions_have_one_signature(flights: Pushed) -> None:
    first, second = (flights.repository.version("flights", number).manifest for number in (1, 2))
    assert first.inputs == second.inputs
    assert first.outputs == second.outputs
    datatypes = {spec.name: spec.datatype for spec in first.inputs}
    assert datatypes["month"] is Datatype.INT64
    assert datatypes["carrier"] is Datatype.BYTES
    assert all(spec.shape == (-1,) for spec in (*first.inputs, *first.outputs))


def test_quality_on_held_out_weeks(flights: Pushed) -> None:
    first, second = (
        flights.repository.version("flights", number).manifest.metadata["held_out"]
        for number in (1, 2)
    )
    assert first["rows"] == second["rows"] > 60_000
    assert first["auc"] > 0.63
    # Row by row the standard error of an AUC on so many flights is about 0.0025.
    assert second["auc"] > first["auc"] + 0.01
    assert second["log_loss"] < first["log_loss"] < first["base_rate_log_loss"]
    assert second["brier"] < first["brier"] < first["base_rate_brier"]


def test_metadata_tells_where_a_version_comes_from(flights: Pushed) -> None:
    metadata = flights.repository.version("flights", 2).manifest.metadata
    assert metadata["source"]["rows"] == 336_776
    assert metadata["training"]["rows"] + metadata["held_out"]["rows"] == 336_776 - 9_430
    assert metadata["onnx_largest_difference"] < 1e-5
    assert metadata["look_ahead"]["rows"] > 50_000
    assert set(metadata["recipe"]["packages"]) == {"numpy", "scikit-learn", "skl2onnx"}


def test_it_prints_what_it_did(flights: Pushed) -> None:
    assert "336,776 flights" in flights.printed
    assert "9,430 have no arrival delay" in flights.printed
    assert "always the base rate" in flights.printed
    assert "warning" not in flights.printed


def test_second_run_pushes_nothing(flights: Pushed) -> None:
    printed = run_script(
        "flights/train.py", "--repository", flights.repository.root, "--rows", flights.rows
    )
    assert printed.count("--force") == 2
    assert flights.printed.split("\nversion ")[1] == printed.split("\nversion ")[1]
    assert flights.repository.versions("flights") == [1, 2]


def test_rows_are_current(flights: Pushed) -> None:
    checked_in = (EXAMPLES / "flights" / "rows.json").read_text()
    assert flights.rows.read_text() == checked_in, (
        "examples/flights/rows.json is stale: run examples/flights/train.py"
    )


def test_rows_are_what_the_model_takes(flights: Pushed) -> None:
    manifest = flights.repository.version("flights", 2).manifest
    request = json.loads((EXAMPLES / "flights" / "rows.json").read_text())
    assert [tensor["name"] for tensor in request["inputs"]] == [
        spec.name for spec in manifest.inputs
    ]


def test_weeks_are_held_out_whole() -> None:
    data = import_script("flights/flights_data.py")
    flights = data.load_flights()
    held_out = data.is_held_out(flights)
    days = flights.assign(held_out=held_out).groupby(["month", "day"])["held_out"]
    assert (days.nunique() == 1).all()
    assert 0.19 < held_out.mean() < 0.21
    assert flights["month"][held_out].nunique() == 12
    assert not data.was_delayed(flights)[~data.was_flown(flights)].any()


def test_unknown_carrier_is_predicted_too(flights: Pushed) -> None:
    data = import_script("flights/flights_data.py")
    inputs = data.model_inputs(data.load_flights()[:2])
    inputs["carrier"][0] = b"??"
    for number in (1, 2):
        model = load_model(flights.repository.version("flights", number))
        output = model.run(model.prepare(inputs))["delayed_probability"]
        assert output.dtype == np.float32
        assert ((output > 0) & (output < 1)).all()
        model.close()


@pytest.mark.e2e
def test_client_over_every_wire(flights: Pushed) -> None:
    with serve_version(flights.repository.version("flights", 2)) as server:
        printed = run_script(
            "flights/client.py", "--url", server.url, "--grpc-url", server.grpc_url
        )
        wrong = run_script(
            "flights/client.py",
            *("--url", server.url, "--grpc-url", server.grpc_url, "--model", "fligths"),
            ok=False,
        )
    for wire in ("HTTP, JSON", "HTTP, binary", "HTTP, binary, gzip", "gRPC"):
        assert f"{wire:<20}8 flights" in printed
    assert "The same answers came over every wire" in printed
    assert "cancelled or diverted" in printed
    assert f"curl {server.url}/v2/models/flights/infer" in printed
    assert "Is a fleet up that serves 'fligths'" in wrong
    assert "Traceback" not in wrong


def test_client_says_when_no_fleet_is_up() -> None:
    said = run_script("flights/client.py", "--url", "http://127.0.0.1:9", ok=False)
    assert "Is a fleet up" in said
    assert "Traceback" not in said
