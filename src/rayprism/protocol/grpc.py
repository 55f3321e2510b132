"""Inference requests and answers over gRPC, and the other answers as messages.

Source: Open Inference Protocol v2, "gRPC". Answers always carry raw contents, which stock clients
read and which need no copy element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from rayprism.core.tensors import Array, Datatype, Tensors, numpy_dtype
from rayprism.errors import InvalidInput, RequestError
from rayprism.protocol import metadata
from rayprism.protocol.fields import (
    MAX_TENSORS,
    about_output,
    apply_parameters,
    check_count,
    check_id,
    check_model_name,
    check_name,
    check_output_parameters,
    check_shape,
    parse_datatype,
    refuse_shared_memory,
    timeout_s_or_none,
)
from rayprism.protocol.grpc_messages import (
    InferParameter,
    InferTensorContents,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    add_GRPCInferenceServiceServicer_to_server,
)
from rayprism.protocol.messages import InferRequest, InferResponse, RequestedOutput
from rayprism.protocol.metadata import ModelState, ModelStatistics, ServedModel
from rayprism.protocol.raw import array_from_raw, output_array, raw_from_array
from rayprism.protocol.select import select_outputs

__all__ = [
    "InferParameter",
    "InferTensorContents",
    "ModelConfigRequest",
    "ModelConfigResponse",
    "ModelInferRequest",
    "ModelInferResponse",
    "ModelMetadataRequest",
    "ModelMetadataResponse",
    "ModelReadyRequest",
    "ModelReadyResponse",
    "ModelStatisticsRequest",
    "ModelStatisticsResponse",
    "ModelStreamInferResponse",
    "RepositoryIndexRequest",
    "RepositoryIndexResponse",
    "RepositoryModelLoadRequest",
    "RepositoryModelLoadResponse",
    "RepositoryModelUnloadRequest",
    "RepositoryModelUnloadResponse",
    "ServerLiveRequest",
    "ServerLiveResponse",
    "ServerMetadataRequest",
    "ServerMetadataResponse",
    "ServerReadyRequest",
    "ServerReadyResponse",
    "add_GRPCInferenceServiceServicer_to_server",
    "decode_infer_request_grpc",
    "decode_infer_response_grpc",
    "encode_infer_response_grpc",
    "model_config_grpc",
    "model_metadata_grpc",
    "model_statistics_grpc",
    "parse_infer_response",
    "repository_index_grpc",
    "request_timeout_s_grpc",
    "server_metadata_grpc",
]

_CONTENTS = {
    Datatype.BOOL: "bool_contents",
    Datatype.INT8: "int_contents",
    Datatype.INT16: "int_contents",
    Datatype.INT32: "int_contents",
    Datatype.INT64: "int64_contents",
    Datatype.UINT8: "uint_contents",
    Datatype.UINT16: "uint_contents",
    Datatype.UINT32: "uint_contents",
    Datatype.UINT64: "uint64_contents",
    Datatype.FP32: "fp32_contents",
    Datatype.FP64: "fp64_contents",
    Datatype.BYTES: "bytes_contents",
}
_WIRE: dict[str, np.dtype[Any]] = {
    "int_contents": np.dtype(np.int32),
    "uint_contents": np.dtype(np.uint32),
}


def decode_infer_request_grpc(message: Any) -> InferRequest:
    """Decodes a ModelInferRequest.

    Args:
        message: A `ModelInferRequest`. Raw contents become views of its bytes where they can: see
            `rayprism.protocol.raw.array_from_raw`.

    Raises:
        InvalidInput: The request is malformed; names the field, what was got, what is allowed.
        Unsupported: It uses an extension that rayprism does not offer.
    """
    request = InferRequest({}, check_id(message.id))
    if message.parameters:
        apply_parameters(request, _plain_parameters("parameters", message.parameters))
        # Answers over gRPC are always raw.
        request.binary_by_default = False
    if not message.inputs:
        raise InvalidInput("inputs is empty, allowed is at least one tensor")
    request.tensors = _decode_tensors(
        "inputs", message.inputs, "raw_input_contents", message.raw_input_contents
    )
    if message.outputs:
        request.outputs = _decode_outputs(message.outputs)
    return request


def _decode_tensors(
    field: Literal["inputs", "outputs"],
    items: Sequence[Any],
    raw_field: str,
    raw: Sequence[bytes],
) -> Tensors:
    if len(items) > MAX_TENSORS:
        raise InvalidInput(f"{field} has {len(items)} items, allowed are at most {MAX_TENSORS}")
    tensors: Tensors = {}
    for index, item in enumerate(items):
        where = f"{field}[{index}]"
        name = check_name(where, item.name, tensors)
        datatype = parse_datatype(where, item.datatype)
        shape = check_shape(where, list(item.shape))
        if item.parameters:
            refuse_shared_memory(where, item.parameters)
        if not raw:
            tensors[name] = _from_contents(where, name, datatype, shape, item.contents, raw_field)
            continue
        if item.HasField("contents"):
            raise InvalidInput(
                f"{where}.contents is given, and so is {raw_field}, allowed is one of them"
            )
        if index >= len(raw):
            raise InvalidInput(
                f"{raw_field} has {len(raw)} entries, none for {where} ({name!r}): allowed is one "
                f"for each of the {field}, or none at all"
            )
        content = raw[index]
        tensors[name] = array_from_raw(name, datatype, shape, content, 0, len(content))
    if raw and len(raw) != len(items):
        raise InvalidInput(
            f"{raw_field} has {len(raw)} entries, allowed is one for each of the "
            f"{len(items)} {field}, or none at all"
        )
    return tensors


def _from_contents(
    where: str,
    name: str,
    datatype: Datatype,
    shape: tuple[int, ...],
    contents: Any,
    raw_field: str,
) -> Array:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InvalidInput(
            f"input {name!r}: {datatype} has no field in {where}.contents, allowed is {raw_field}"
        )
    wrong = [given.name for given, _ in contents.ListFields() if given.name != field]
    if wrong:
        raise InvalidInput(
            f"{where}.contents.{wrong[0]} is given, allowed for {datatype} is {field}"
        )
    values = getattr(contents, field)
    count = check_count(where, shape)
    if len(values) != count:
        raise InvalidInput(
            f"input {name!r}: got {len(values)} values in {field}, shape {list(shape)} needs "
            f"{count}"
        )
    target = numpy_dtype(datatype)
    array: Array
    if datatype is Datatype.BYTES:
        array = np.empty(count, np.object_)
        array[:] = list(values)
        return array.reshape(shape)
    array = np.fromiter(values, _WIRE.get(field, target), count)
    if array.dtype != target:
        array = _narrow(name, datatype, array, target)
    return array.reshape(shape)


def _narrow(name: str, datatype: Datatype, array: Array, target: np.dtype[Any]) -> Array:
    limits = np.iinfo(target)
    wrong = (array < limits.min) | (array > limits.max)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidInput(
            f"input {name!r}: value {index} is {array[index]}, out of range for {datatype} "
            f"({limits.min} to {limits.max})"
        )
    return array.astype(target)


def _plain_parameters(where: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    plain = {}
    for name, value in parameters.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidInput(f"{where}.{name[:64]} has no value, allowed is one of its choices")
        plain[name] = getattr(value, choice)
    return plain


def _decode_outputs(outputs: Sequence[Any]) -> tuple[RequestedOutput, ...]:
    if len(outputs) > MAX_TENSORS:
        raise InvalidInput(f"outputs has {len(outputs)} items, allowed are at most {MAX_TENSORS}")
    wanted: dict[str, RequestedOutput] = {}
    for index, item in enumerate(outputs):
        where = f"outputs[{index}]"
        name = check_name(where, item.name, wanted)
        if item.parameters:
            parameters = _plain_parameters(f"{where}.parameters", item.parameters)
            check_output_parameters(where, parameters, False)
        wanted[name] = RequestedOutput(name)
    return tuple(wanted.values())


def request_timeout_s_grpc(message: Any) -> float | None:
    """The time that a `ModelInferRequest` allows, in seconds, without a look at its tensors.

    None where it names none, or a faulty one: `decode_infer_request_grpc` complains of that where
    the request is answered.
    """
    # Asking a map of messages for a key that it lacks would add the key to the request.
    if "timeout" not in message.parameters:
        return None
    value = message.parameters["timeout"]
    choice = value.WhichOneof("parameter_choice")
    return None if choice is None else timeout_s_or_none(getattr(value, choice))


def encode_infer_response_grpc(
    model: str, version: str, request: InferRequest, outputs: Tensors
) -> Any:
    """Encodes the answer to an inference request as a `ModelInferResponse`.

    Args:
        model: The model's name.
        version: The version that answered.
        request: What is answered: its id, and which outputs it wants.
        outputs: The model's outputs, all or only the wanted ones.

    Raises:
        InvalidInput: An output is wanted that is not there.
        ModelFailed: An output is of a kind that the protocol does not have.
    """
    answer = ModelInferResponse(model_name=model, model_version=version, id=request.id)
    contents = []
    for name in select_outputs(request, list(outputs)):
        datatype, array = output_array(name, outputs[name])
        answer.outputs.add(name=name, datatype=datatype.value, shape=array.shape)
        contents.append(raw_from_array(name, datatype, array))
    answer.raw_output_contents.extend(contents)
    return answer


def parse_infer_response(data: bytes) -> Any:
    """A `ModelInferResponse` from its bytes on the wire.

    Raises:
        InvalidInput: They are not one.
    """
    try:
        return ModelInferResponse.FromString(data)
    except DecodeError:
        raise InvalidInput(
            f"{len(data)} bytes are not a ModelInferResponse: protobuf cannot read them"
        ) from None


def decode_infer_response_grpc(message: Any) -> InferResponse:
    """Decodes a ModelInferResponse, with raw contents or typed ones.

    Args:
        message: A `ModelInferResponse`. Raw contents become read-only views of its bytes where
            they can.

    Raises:
        InvalidInput: It is malformed.
    """
    try:
        model = check_model_name(message.model_name)
        request_id = check_id(message.id)
        outputs = _decode_tensors(
            "outputs", message.outputs, "raw_output_contents", message.raw_output_contents
        )
    except RequestError as error:
        raise about_output(error) from None
    return InferResponse(model, message.model_version, request_id, outputs)


def _parsed(kind: Callable[[], Any], plain: Any) -> Any:
    return ParseDict(plain, kind())


def server_metadata_grpc() -> Any:
    """`rayprism.protocol.metadata.server_metadata` as a `ServerMetadataResponse`."""
    return _parsed(ServerMetadataResponse, metadata.server_metadata())


def model_metadata_grpc(model: ServedModel) -> Any:
    """`rayprism.protocol.metadata.model_metadata` as a `ModelMetadataResponse`."""
    return _parsed(ModelMetadataResponse, metadata.model_metadata(model))


def model_config_grpc(model: ServedModel) -> Any:
    """`rayprism.protocol.metadata.model_config` as a `ModelConfigResponse`."""
    return _parsed(ModelConfigResponse, {"config": metadata.model_config(model)})


def model_statistics_grpc(models: Sequence[tuple[ServedModel, ModelStatistics]]) -> Any:
    """`rayprism.protocol.metadata.model_statistics` as a `ModelStatisticsResponse`."""
    return _parsed(ModelStatisticsResponse, metadata.model_statistics(models))


def repository_index_grpc(
    models: Sequence[tuple[ServedModel, ModelState, str]], *, ready_only: bool = False
) -> Any:
    """`rayprism.protocol.metadata.repository_index` as a `RepositoryIndexResponse`."""
    index = metadata.repository_index(models, ready_only=ready_only)
    return _parsed(RepositoryIndexResponse, {"models": index})
