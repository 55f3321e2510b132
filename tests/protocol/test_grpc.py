"""The gRPC codec, against the stock client over a real connection."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as stock
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.utils import InferenceServerException

from rayprism.core.tensors import Array, Datatype
from rayprism.errors import InvalidInput, ModelFailed, RequestError, Unsupported
from rayprism.protocol import grpc as codec
from rayprism.protocol import metadata
from rayprism.protocol.grpc import decode_infer_request_grpc, encode_infer_response_grpc
from rayprism.protocol.messages import InferRequest, RequestedOutput
from rayprism.protocol.status import grpc_status, public_message
from tests.protocol.tensors import SAMPLES, assert_same
from tests.protocol.test_metadata import FLIGHTS, INDEX, STATISTICS


class Echo:
    """Answers every inference with its own inputs."""

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return codec.ServerLiveResponse(live=True)

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return codec.server_metadata_grpc()

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return codec.model_metadata_grpc(FLIGHTS)

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return codec.model_config_grpc(FLIGHTS)

    def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        return codec.model_statistics_grpc([(FLIGHTS, STATISTICS)])

    def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        return codec.repository_index_grpc(INDEX, ready_only=request.ready)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            decoded = decode_infer_request_grpc(request)
            return encode_infer_response_grpc(request.model_name, "3", decoded, decoded.tensors)
        except RequestError as error:
            context.abort(grpc.StatusCode[grpc_status(error)], public_message(error))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    server = grpc.server(ThreadPoolExecutor(2))
    codec.add_GRPCInferenceServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    with stock.InferenceServerClient(f"localhost:{port}") as connected:
        yield connected
    server.stop(None).wait()


def stock_input(name: str, datatype: Datatype, array: Array) -> Any:
    tensor = stock.InferInput(name, list(array.shape), datatype.value)
    return tensor.set_data_from_numpy(array)


@pytest.mark.parametrize("datatype", list(Datatype))
def test_echo_of_every_datatype(client: Any, datatype: Datatype) -> None:
    array = SAMPLES[datatype]
    result = client.infer("m", [stock_input("x", datatype, array)], request_id="7")
    assert_same(result.as_numpy("x"), array)
    answer = result.get_response()
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "m", "3")


def test_only_wanted_outputs_come_in_the_order_they_are_wanted(client: Any) -> None:
    inputs = [stock_input(name, Datatype.INT8, SAMPLES[Datatype.INT8]) for name in "abc"]
    wanted = [stock.InferRequestedOutput(name) for name in "ca"]
    answer = client.infer("m", inputs, outputs=wanted).get_response()
    assert [output.name for output in answer.outputs] == ["c", "a"]


def test_errors_reach_the_client(client: Any) -> None:
    inputs = [stock_input("x", Datatype.INT8, SAMPLES[Datatype.INT8])]
    with pytest.raises(InferenceServerException, match="'y'") as caught:
        client.infer("m", inputs, outputs=[stock.InferRequestedOutput("y")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="sequence_id") as caught:
        client.infer("m", inputs, sequence_id=5)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_methods_that_the_servicer_lacks_are_unimplemented(client: Any) -> None:
    for call in (
        lambda: client.is_model_ready("m"),
        lambda: client.load_model("m"),
        lambda: client.unload_model("m"),
    ):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_documents_are_those_of_http(client: Any) -> None:
    def as_numbers(value: Any) -> Any:
        """protobuf writes 64-bit numbers as strings, and leaves out what is 0."""
        if isinstance(value, dict):
            kept = {key: as_numbers(inner) for key, inner in value.items()}
            return {key: inner for key, inner in kept.items() if inner not in (0, "", [], {})}
        if isinstance(value, list):
            return [as_numbers(inner) for inner in value]
        if isinstance(value, str) and value.lstrip("-").isdecimal():
            return int(value)
        return value

    assert client.is_server_live()
    server = as_numbers(client.get_server_metadata(as_json=True))
    assert server == as_numbers(metadata.server_metadata())
    model = as_numbers(client.get_model_metadata("flights", as_json=True))
    assert model == as_numbers(metadata.model_metadata(FLIGHTS))
    config = as_numbers(client.get_model_config("flights", as_json=True))["config"]
    expected = as_numbers(metadata.model_config(FLIGHTS))
    expected["dynamic_batching"]["default_queue_policy"].pop("timeout_action")  # REJECT is 0
    assert config == expected
    statistics = as_numbers(client.get_inference_statistics(as_json=True))
    assert statistics == as_numbers(metadata.model_statistics([(FLIGHTS, STATISTICS)]))
    index = as_numbers(client.get_model_repository_index(as_json=True))["models"]
    assert index == as_numbers(metadata.repository_index(INDEX))


def test_the_index_can_be_only_what_is_ready() -> None:
    answer = codec.repository_index_grpc(INDEX, ready_only=True)
    assert [model.state for model in answer.models] == ["READY"]


def test_the_documents_have_the_signatures_of_http() -> None:
    for name in ("model_metadata", "model_config", "model_statistics", "repository_index"):
        http = inspect.signature(getattr(metadata, name)).parameters
        assert inspect.signature(getattr(codec, f"{name}_grpc")).parameters == http


def stock_message(**more: Any) -> Any:
    arguments: dict[str, Any] = {
        "model_name": "m",
        "inputs": [stock_input("x", Datatype.FP32, SAMPLES[Datatype.FP32])],
        "model_version": "",
        "request_id": "",
        "outputs": None,
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "priority": 0,
        "timeout": None,
        "parameters": None,
    }
    made = _get_inference_request(**{**arguments, **more})
    return codec.ModelInferRequest.FromString(made.SerializeToString())


def test_parameters_that_the_stock_client_sends() -> None:
    parameters = {"tenant": "a", "share": 0.5, "dry": True, "n": 3}
    request = decode_infer_request_grpc(
        stock_message(priority=2, timeout=1_500_000, parameters=parameters, request_id="7")
    )
    assert request.id == "7"
    assert request.priority == 2
    assert request.timeout_s == 1.5
    assert request.parameters == parameters
    assert decode_infer_request_grpc(stock_message(timeout=0)).timeout_s is None


def test_raw_contents_are_views() -> None:
    message = stock_message()
    array = decode_infer_request_grpc(message).tensors["x"]
    assert array.base is not None
    assert not array.flags.writeable


def message(*inputs: dict[str, Any], **more: Any) -> Any:
    return codec.ModelInferRequest(inputs=inputs, **more)


def contents(datatype: str, field: str, *values: Any, shape: Any = None) -> Any:
    sizes = [len(values)] if shape is None else shape
    return message({"name": "x", "datatype": datatype, "shape": sizes, "contents": {field: values}})


def with_parameter(**choice: Any) -> Any:
    made = contents("FP32", "fp32_contents", 1.0)
    made.parameters["timeout"].CopyFrom(codec.InferParameter(**choice))
    return made


X = {"name": "x", "datatype": "INT8", "shape": [2]}
OK = contents("FP32", "fp32_contents", 1.0)


def ok_with(**more: Any) -> Any:
    made = codec.ModelInferRequest(**more)
    made.inputs.extend(OK.inputs)
    return made


def unset_parameter() -> Any:
    made = ok_with()
    made.parameters["empty"].SetInParent()
    return made


FAULTS: list[tuple[Any, str]] = [
    (message(), "inputs is empty"),
    (message(*[{**X, "name": str(i)} for i in range(1025)]), "inputs has 1025 items"),
    (message({**X, "name": ""}), r"inputs\[0\].name has 0 characters"),
    (message({**X, "name": "x" * 300}), "has 300 characters"),
    (message(X, X, raw_input_contents=[b"ab", b"ab"]), r"inputs\[1\].name is 'x' again"),
    (message({**X, "datatype": ""}), r"inputs\[0\].datatype is the string ''"),
    (message({**X, "datatype": "INT9"}), "Did you mean 'INT"),
    (message({**X, "shape": [-1]}), r"inputs\[0\].shape\[0\] is the number -1"),
    (message({**X, "shape": [2**62, 4]}), "more elements than"),
    (message({**X, "shape": [1] * 33}), "shape has 33 axes"),
    (message(X), "got 0 values in int_contents, shape .2. needs 2"),
    (message(X, raw_input_contents=[b"abc"]), "got 3 bytes, INT8 of shape .2. needs 2"),
    (message(X, raw_input_contents=[b"ab", b""]), "raw_input_contents has 2 entries"),
    (
        message(X, {**X, "name": "y"}, raw_input_contents=[b"ab"]),
        r"raw_input_contents has 1 entries, none for inputs\[1\] \('y'\)",
    ),
    (
        message({**X, "contents": {"int_contents": [1, 2]}}, raw_input_contents=[b"ab"]),
        r"inputs\[0\].contents is given, and so is raw_input_contents",
    ),
    (message({**X, "contents": {}}, raw_input_contents=[b"ab"]), "is given, and so is"),
    (
        message({**X, "datatype": "BOOL"}, raw_input_contents=[b"\x00\x02"]),
        "byte 1 is 2, allowed for BOOL",
    ),
    (
        message({**X, "datatype": "BYTES"}, raw_input_contents=[b"\x09\x00\x00\x00abcd"]),
        "element 0 of BYTES says it has 9 bytes",
    ),
    (contents("INT8", "int_contents", 1, 128), r"value 1 is 128, out of range for INT8"),
    (contents("INT8", "int_contents", -129), "value 0 is -129"),
    (contents("INT16", "int_contents", 2**15), "out of range for INT16"),
    (contents("UINT8", "uint_contents", 256), r"out of range for UINT8 \(0 to 255\)"),
    (contents("UINT16", "uint_contents", 2**16), "out of range for UINT16"),
    (contents("INT32", "int64_contents", 1), "int64_contents is given, allowed for INT32 is int"),
    (contents("INT64", "int_contents", 1), "allowed for INT64 is int64_contents"),
    (contents("UINT8", "int_contents", 1), "allowed for UINT8 is uint_contents"),
    (contents("FP32", "fp64_contents", 1.0), "allowed for FP32 is fp32_contents"),
    (contents("FP64", "fp32_contents", 1.0), "allowed for FP64 is fp64_contents"),
    (contents("BYTES", "bool_contents", True), "allowed for BYTES is bytes_contents"),
    (contents("FP16", "fp32_contents", 1.0), "FP16 has no field .* raw_input_contents"),
    (contents("BF16", "fp32_contents", 1.0), "BF16 has no field .* raw_input_contents"),
    (contents("FP32", "fp32_contents", 1.0, 2.0, shape=[3]), "got 2 values in fp32_contents"),
    (contents("FP32", "fp32_contents", 1.0, shape=[2**40]), "needs 1099511627776"),
    (contents("BYTES", "bytes_contents", b"a", shape=[2**40]), "needs 1099511627776"),
    (contents("FP32", "fp32_contents", shape=[0, 2**62]), "more elements than"),
    (with_parameter(int64_param=-1), "parameters.timeout is the number -1"),
    (with_parameter(double_param=1.0), "parameters.timeout is the number 1.0"),
    (with_parameter(string_param="1"), "parameters.timeout is the string '1'"),
    (with_parameter(bool_param=True), "parameters.timeout is true"),
    (with_parameter(uint64_param=2**64 - 1), "parameters.timeout is the number 1844"),
    (unset_parameter(), "parameters.empty has no value"),
    (ok_with(outputs=[{"name": ""}]), r"outputs\[0\].name has 0 characters"),
    (ok_with(outputs=[{"name": "y"}, {"name": "y"}]), r"outputs\[1\].name is 'y' again"),
    (ok_with(outputs=[{"name": str(i)} for i in range(1025)]), "outputs has 1025 items"),
    (ok_with(id="x" * 2000), "id has 2000 characters"),
]


@pytest.mark.parametrize(("sent", "fault"), FAULTS)
def test_faults(sent: Any, fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault):
        decode_infer_request_grpc(sent)


def test_unsupported() -> None:
    shared = stock.InferInput("x", [1], "FP32").set_shared_memory("region", 4)
    with pytest.raises(Unsupported, match=r"inputs\[0\].parameters.shared_memory_region"):
        decode_infer_request_grpc(stock_message(inputs=[shared]))
    output = stock.InferRequestedOutput("y")
    output.set_shared_memory("region", 4)
    with pytest.raises(Unsupported, match=r"outputs\[0\].parameters.shared_memory_region"):
        decode_infer_request_grpc(stock_message(outputs=[output]))
    classes = [stock.InferRequestedOutput("y", class_count=2)]
    with pytest.raises(Unsupported, match="classification"):
        decode_infer_request_grpc(stock_message(outputs=classes))
    with pytest.raises(Unsupported, match="sequence"):  # any of its parameters may come first
        decode_infer_request_grpc(stock_message(sequence_id="a", sequence_start=True))


def test_empty_tensors_without_contents() -> None:
    for datatype in ("FP32", "BYTES", "INT8"):
        sent = message({"name": "x", "datatype": datatype, "shape": [0, 3]})
        assert decode_infer_request_grpc(sent).tensors["x"].shape == (0, 3)


def test_encode_faults() -> None:
    wanted = InferRequest({}, outputs=(RequestedOutput("z"),))
    with pytest.raises(InvalidInput, match="'z'"):
        encode_infer_response_grpc("m", "1", wanted, {"y": np.zeros(1)})
    with pytest.raises(ModelFailed, match="'y'"):
        encode_infer_response_grpc("m", "1", InferRequest({}), {"y": np.array([1j])})
