"""Inference requests and answers over gRPC, and the other answers as messages.

Source: Open Inference Protocol v2, "gRPC". Answers always carry raw contents, which stock clients
read and which need no copy element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict

from rayprism.core.tensors import Array, Datatype, Tensors, numpy_dtype
from rayprism.errors import InvalidInput
from rayprism.protocol import metadata
from rayprism.protocol.fields import (
    MAX_TENSORS,
    apply_parameters,
    check_count,
    check_id,
    check_name,
    check_output_parameters,
    check_shape,
    parse_datatype,
    refuse_shared_memory,
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
from rayprism.protocol.messages import InferRequest, RequestedOutput
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
    "encode_infer_response_grpc",
    "model_config_grpc",
    "model_metadata_grpc",
    "model_statistics_grpc",
    "repository_index_grpc",
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
    inputs, raw = message.inputs, message.raw_input_contents
    if not inputs:
        raise InvalidInput("inputs is empty, allowed is at least one tensor")
    if len(inputs) > MAX_TENSORS:
        raise InvalidInput(f"inputs has {len(inputs)} items, allowed are at most {MAX_TENSORS}")
    tensors = request.tensors
    for index, item in enumerate(inputs):
        where = f"inputs[{index}]"
        name = check_name(where, item.name, tensors)
        datatype = parse_datatype(where, item.datatype)
        shape = check_shape(where, list(item.shape))
        if item.parameters:
            refuse_shared_memory(where, item.parameters)
        if raw:
            tensors[name] = _from_raw(where, name, datatype, shape, item, raw, index)
        else:
            tensors[name] = _from_contents(where, name, datatype, shape, item.contents)
    if raw and len(raw) != len(inputs):
        raise InvalidInput(
            f"raw_input_contents has {len(raw)} entries, allowed is one for each of the "
            f"{len(inputs)} inputs, or none at all"
        )
    if message.outputs:
        request.outputs = _decode_outputs(message.outputs)
    return request


def _from_raw(
    where: str,
    name: str,
    datatype: Datatype,
    shape: tuple[int, ...],
    item: Any,
    raw: Sequence[bytes],
    index: int,
) -> Array:
    if item.HasField("contents"):
        raise InvalidInput(
            f"{where}.contents is given, and so is raw_input_contents, allowed is one of them"
        )
    if index >= len(raw):
        raise InvalidInput(
            f"raw_input_contents has {len(raw)} entries, none for input {name!r}: allowed is one "
            "for each input, or none at all"
        )
    content = raw[index]
    return array_from_raw(name, datatype, shape, content, 0, len(content))


def _from_contents(
    where: str, name: str, datatype: Datatype, shape: tuple[int, ...], contents: Any
) -> Array:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InvalidInput(
            f"input {name!r}: {datatype} has no field in {where}.contents, "
            "allowed is raw_input_contents"
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
