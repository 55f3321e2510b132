from __future__ import annotations

import orjson
import tritonclient.grpc.model_config_pb2 as stock_config
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2

from rayprism.core.tensors import Datatype, TensorSpec
from rayprism.protocol.metadata import (
    BatchStatistics,
    DurationStatistics,
    ModelState,
    ModelStatistics,
    ServedModel,
    model_config,
    model_metadata,
    model_ready,
    model_statistics,
    repository_index,
    server_metadata,
)

FLIGHTS = ServedModel(
    name="flights",
    version="3",
    inputs=(
        TensorSpec("origin", Datatype.BYTES, (-1, 1)),
        TensorSpec("distance", Datatype.FP32, (-1, 1)),
    ),
    outputs=(TensorSpec("delay", Datatype.FP32, (8, -1)),),
    max_rows=64,
    max_delay_s=0.002,
    platform="onnxruntime_onnx",
    backend="onnxruntime",
    versions=("3", "4"),
    default_timeout_s=60,
    priority_levels=3,
    default_priority=2,
)
WHOLE = ServedModel(
    name="segmenter",
    version="dev",
    inputs=(TensorSpec("image", Datatype.UINT8, (480, -1, 3)),),
    outputs=(TensorSpec("mask", Datatype.BOOL, (480, -1)),),
    batched=False,
)
STATISTICS = ModelStatistics(
    inference_count=10,
    execution_count=4,
    last_inference_ms=1_700_000_000_000,
    success=DurationStatistics(7, 7000),
    fail=DurationStatistics(1, 50),
    queue=DurationStatistics(7, 300),
    compute_input=DurationStatistics(4, 10),
    compute_infer=DurationStatistics(4, 4000),
    compute_output=DurationStatistics(4, 20),
    batch_stats={
        3: BatchStatistics(compute_infer=DurationStatistics(2, 2500)),
        2: BatchStatistics(compute_infer=DurationStatistics(2, 1500)),
    },
)
INDEX: list[tuple[ServedModel, ModelState, str]] = [
    (FLIGHTS, "READY", ""),
    (WHOLE, "UNAVAILABLE", "taken down"),
]


def test_server() -> None:
    document = server_metadata()
    assert document["name"] == "rayprism"
    assert document["version"]
    assert "binary_tensor_data" in document["extensions"]
    assert document["extensions"] == sorted(document["extensions"])


def test_model() -> None:
    assert model_metadata(FLIGHTS) == {
        "name": "flights",
        "versions": ["3", "4"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "origin", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "distance", "datatype": "FP32", "shape": [-1, 1]},
        ],
        # Exported with a batch of 8, which is no concern of the client.
        "outputs": [{"name": "delay", "datatype": "FP32", "shape": [-1, -1]}],
    }
    whole = model_metadata(WHOLE)
    assert whole["versions"] == ["dev"]
    assert whole["inputs"][0]["shape"] == [480, -1, 3]
    assert model_ready(FLIGHTS) == {"name": "flights", "ready": True}


def test_config_of_a_batched_model() -> None:
    config = model_config(FLIGHTS)
    assert config["max_batch_size"] == 64
    assert config["input"] == [
        {"name": "origin", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "distance", "data_type": "TYPE_FP32", "dims": [1]},
    ]
    assert config["output"] == [{"name": "delay", "data_type": "TYPE_FP32", "dims": [-1]}]
    assert config["version_policy"] == {"specific": {"versions": [3]}}
    batching = config["dynamic_batching"]
    assert batching["max_queue_delay_microseconds"] == 2000
    assert batching["priority_levels"] == 3
    assert batching["default_priority_level"] == 2
    assert batching["default_queue_policy"]["default_timeout_microseconds"] == 60_000_000


def test_config_of_a_model_that_is_not_batched() -> None:
    config = model_config(WHOLE)
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [480, -1, 3]
    assert "dynamic_batching" not in config
    assert "version_policy" not in config


def test_every_datatype_has_a_name_in_the_config() -> None:
    for datatype in Datatype:
        model = ServedModel("m", "1", (TensorSpec("x", datatype, (-1,)),), ())
        parsed = ParseDict(model_config(model), stock_config.ModelConfig())
        assert parsed.input[0].data_type != stock_config.TYPE_INVALID


def test_statistics() -> None:
    (document,) = model_statistics([(FLIGHTS, STATISTICS)])["model_stats"]
    assert (document["name"], document["version"]) == ("flights", "3")
    assert (document["inference_count"], document["execution_count"]) == (10, 4)
    assert document["last_inference"] == 1_700_000_000_000
    assert document["inference_stats"]["success"] == {"count": 7, "ns": 7000}
    assert [entry["batch_size"] for entry in document["batch_stats"]] == [2, 3]
    assert document["batch_stats"][0]["compute_infer"] == {"count": 2, "ns": 1500}
    assert model_statistics([])["model_stats"] == []


def test_index() -> None:
    assert repository_index(INDEX) == [
        {"name": "flights", "version": "3", "state": "READY", "reason": ""},
        {"name": "segmenter", "version": "dev", "state": "UNAVAILABLE", "reason": "taken down"},
    ]
    assert [entry["name"] for entry in repository_index(INDEX, ready_only=True)] == ["flights"]


def test_the_stock_client_knows_every_field() -> None:
    for model in (FLIGHTS, WHOLE):
        ParseDict(model_metadata(model), service_pb2.ModelMetadataResponse())
        ParseDict(model_config(model), stock_config.ModelConfig())
    ParseDict(server_metadata(), service_pb2.ServerMetadataResponse())
    statistics = model_statistics([(FLIGHTS, STATISTICS), (WHOLE, ModelStatistics())])
    ParseDict(statistics, service_pb2.ModelStatisticsResponse())
    ParseDict({"models": repository_index(INDEX)}, service_pb2.RepositoryIndexResponse())
    orjson.dumps(statistics)
