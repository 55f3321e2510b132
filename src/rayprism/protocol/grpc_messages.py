"""The messages and the service of `oip.proto`, in a descriptor pool of their own.

The default pool refuses a second file that defines `inference.ModelInferRequest`, and the stock
client brings one; in a private pool both live in one process. The compiled descriptor,
`oip.binpb`, is checked in: see `rayprism.protocol.grpc_build`.

Messages can be pickled, as Ray Serve does on their way to a replica: their classes are importable
from here under their own names.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = [
    "POOL",
    "SERVICE",
    "InferBatchStatistics",
    "InferParameter",
    "InferStatistics",
    "InferTensorContents",
    "ModelConfig",
    "ModelConfigRequest",
    "ModelConfigResponse",
    "ModelDynamicBatching",
    "ModelInferRequest",
    "ModelInferResponse",
    "ModelInput",
    "ModelMetadataRequest",
    "ModelMetadataResponse",
    "ModelOutput",
    "ModelQueuePolicy",
    "ModelReadyRequest",
    "ModelReadyResponse",
    "ModelRepositoryParameter",
    "ModelStatistics",
    "ModelStatisticsRequest",
    "ModelStatisticsResponse",
    "ModelStreamInferResponse",
    "ModelTransactionPolicy",
    "ModelVersionPolicy",
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
    "StatisticDuration",
    "add_GRPCInferenceServiceServicer_to_server",
]


def _load_pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    compiled = files(__package__).joinpath("oip.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load_pool()
SERVICE = POOL.FindServiceByName("inference.GRPCInferenceService")
"""The service's descriptor."""


def _reduce(message: Any) -> Any:
    # protobuf would look a nested class up in the default pool, where it is not.
    return type(message), (), message.__getstate__()


def _adopt(kind: Any, qualified_name: str) -> None:
    kind.__module__ = __name__
    kind.__qualname__ = qualified_name
    if "." in qualified_name:
        kind.__reduce__ = _reduce
    for nested in kind.DESCRIPTOR.nested_types:
        if not nested.GetOptions().map_entry:
            _adopt(getattr(kind, nested.name), f"{qualified_name}.{nested.name}")


def _message(name: str) -> Any:
    kind = message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))
    _adopt(kind, name)
    return kind


ServerLiveRequest = _message("ServerLiveRequest")
ServerLiveResponse = _message("ServerLiveResponse")
ServerReadyRequest = _message("ServerReadyRequest")
ServerReadyResponse = _message("ServerReadyResponse")
ModelReadyRequest = _message("ModelReadyRequest")
ModelReadyResponse = _message("ModelReadyResponse")
ServerMetadataRequest = _message("ServerMetadataRequest")
ServerMetadataResponse = _message("ServerMetadataResponse")
ModelMetadataRequest = _message("ModelMetadataRequest")
ModelMetadataResponse = _message("ModelMetadataResponse")
InferParameter = _message("InferParameter")
InferTensorContents = _message("InferTensorContents")
ModelInferRequest = _message("ModelInferRequest")
ModelInferResponse = _message("ModelInferResponse")
ModelStreamInferResponse = _message("ModelStreamInferResponse")
ModelConfigRequest = _message("ModelConfigRequest")
ModelConfigResponse = _message("ModelConfigResponse")
ModelInput = _message("ModelInput")
ModelOutput = _message("ModelOutput")
ModelVersionPolicy = _message("ModelVersionPolicy")
ModelQueuePolicy = _message("ModelQueuePolicy")
ModelDynamicBatching = _message("ModelDynamicBatching")
ModelTransactionPolicy = _message("ModelTransactionPolicy")
ModelConfig = _message("ModelConfig")
ModelStatisticsRequest = _message("ModelStatisticsRequest")
StatisticDuration = _message("StatisticDuration")
InferStatistics = _message("InferStatistics")
InferBatchStatistics = _message("InferBatchStatistics")
ModelStatistics = _message("ModelStatistics")
ModelStatisticsResponse = _message("ModelStatisticsResponse")
ModelRepositoryParameter = _message("ModelRepositoryParameter")
RepositoryIndexRequest = _message("RepositoryIndexRequest")
RepositoryIndexResponse = _message("RepositoryIndexResponse")
RepositoryModelLoadRequest = _message("RepositoryModelLoadRequest")
RepositoryModelLoadResponse = _message("RepositoryModelLoadResponse")
RepositoryModelUnloadRequest = _message("RepositoryModelUnloadRequest")
RepositoryModelUnloadResponse = _message("RepositoryModelUnloadResponse")


def add_GRPCInferenceServiceServicer_to_server(  # noqa: N802
    servicer: Any, server: Any
) -> None:
    """Registers a servicer's methods, named like the RPCs, under the public service name.

    Ray Serve finds this function by its import path (`grpc_options.grpc_servicer_functions`). It
    is called as protobuf's generated code calls its own.

    Args:
        servicer: An object with the RPCs as methods. gRPC answers UNIMPLEMENTED for those that it
            does not have.
        server: A `grpc.Server` or `grpc.aio.Server`, or Ray's, which puts its own routing in the
            place of the methods.
    """
    handlers: dict[str, Any] = {}
    for method in SERVICE.methods:
        behavior = getattr(servicer, method.name, None)
        if behavior is None:
            continue
        make = (
            grpc.stream_stream_rpc_method_handler
            if method.client_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            behavior,
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(
                method.output_type
            ).SerializeToString,
        )
    generic = grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(SERVICE.full_name, handlers)
