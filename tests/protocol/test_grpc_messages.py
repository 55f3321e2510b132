"""The messages: the same on the wire as the stock client's, beside it, and picklable."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import model_config_pb2, service_pb2

from rayprism.protocol import grpc as codec
from rayprism.protocol import grpc_build, grpc_messages

OURS = grpc_messages.POOL.FindFileByName("oip.proto")
STOCK = {
    **model_config_pb2.DESCRIPTOR.message_types_by_name,
    **service_pb2.DESCRIPTOR.message_types_by_name,
}


def all_messages(types: Any) -> list[Any]:
    found = []
    for kind in types:
        found.append(kind)
        found.extend(all_messages(kind.nested_types))
    return found


def stock_twin(kind: Any) -> Any:
    if kind.containing_type is None:
        return STOCK[kind.name]
    return stock_twin(kind.containing_type).nested_types_by_name[kind.name]


def described(field: Any) -> tuple[Any, ...]:
    kind = field.message_type or field.enum_type
    group = field.containing_oneof
    return (
        field.number,
        field.type,
        field.is_repeated,
        field.is_packed,
        kind.full_name if kind else None,
        group.name if group else None,
    )


MESSAGES = all_messages(OURS.message_types_by_name.values())


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.full_name)
def test_fields_are_the_stock_clients(kind: Any) -> None:
    twin = stock_twin(kind)
    assert kind.full_name == twin.full_name
    for field in kind.fields:
        assert described(field) == described(twin.fields_by_name[field.name]), field.name


def test_enums_are_the_stock_clients() -> None:
    ours = OURS.enum_types_by_name["DataType"]
    stock = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in stock.values}
    action = OURS.message_types_by_name["ModelQueuePolicy"].enum_types_by_name["TimeoutAction"]
    assert {v.name: v.number for v in action.values} == dict(
        model_config_pb2.ModelQueuePolicy.TimeoutAction.items()
    )


def test_methods_are_the_stock_clients() -> None:
    stock = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert grpc_messages.SERVICE.full_name == stock.full_name
    assert len(grpc_messages.SERVICE.methods) == 12
    for method in grpc_messages.SERVICE.methods:
        twin = stock.methods_by_name[method.name]
        assert method.input_type.full_name == twin.input_type.full_name
        assert method.output_type.full_name == twin.output_type.full_name
        assert method.client_streaming == twin.client_streaming
        assert method.server_streaming == twin.server_streaming


def test_every_message_has_a_name_here() -> None:
    for name in OURS.message_types_by_name:
        assert name in grpc_messages.__all__
        assert getattr(grpc_messages, name).DESCRIPTOR.name == name


def test_the_compiled_descriptor_is_current() -> None:
    assert grpc_build.DESCRIPTOR_FILE.read_bytes() == grpc_build.compile_proto()


def test_the_check_sees_a_stale_descriptor(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grpc_build.main(["--check"]) == 0
    stale = tmp_path / "oip.binpb"
    monkeypatch.setattr(grpc_build, "DESCRIPTOR_FILE", stale)
    assert grpc_build.main(["--check"]) == 1
    stale.write_bytes(b"old")
    assert grpc_build.main(["--check"]) == 1
    assert "is stale: run" in capsys.readouterr().err
    assert grpc_build.main([]) == 0
    assert grpc_build.main(["--check"]) == 0
    assert grpc_build.main(["--chekc"]) == 2


def test_the_default_pool_is_left_alone() -> None:
    stock = descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert stock is service_pb2.ModelInferRequest.DESCRIPTOR
    assert codec.ModelInferRequest is not service_pb2.ModelInferRequest


def request() -> Any:
    message = codec.ModelInferRequest(model_name="m", raw_input_contents=[b"\x00\xff"])
    message.inputs.add(name="x", datatype="UINT8", shape=[2])
    message.parameters["timeout"].int64_param = 5
    return message


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    message = request()
    again = pickle.loads(pickle.dumps(message, protocol))
    assert again == message
    assert type(again) is codec.ModelInferRequest
    if protocol >= 4:  # before, nested classes have no names
        nested = pickle.loads(pickle.dumps(message.inputs[0], protocol))
        assert nested == message.inputs[0]
        assert type(nested) is codec.ModelInferRequest.InferInputTensor


def test_every_message_knows_where_it_lives() -> None:
    for name in OURS.message_types_by_name:
        kind = getattr(grpc_messages, name)
        assert (kind.__module__, kind.__qualname__) == (grpc_messages.__name__, name)
    nested = codec.ModelInferRequest.InferInputTensor
    assert nested.__module__ == grpc_messages.__name__
    assert nested.__qualname__ == "ModelInferRequest.InferInputTensor"


def test_every_message_can_be_pickled() -> None:
    for name in OURS.message_types_by_name:
        message = getattr(grpc_messages, name)()
        assert pickle.loads(pickle.dumps(message)) == message


@pytest.mark.parametrize("first", ["rayprism.protocol.grpc", "tritonclient.grpc"])
def test_pickle_into_another_process(first: str) -> None:
    """Whichever of the two copies of the protocol is imported first."""
    code = (
        f"import sys, pickle, {first}\n"
        "message = pickle.load(sys.stdin.buffer)\n"
        "import tritonclient.grpc\n"
        "message.id = 'changed'\n"
        "sys.stdout.buffer.write(pickle.dumps(message))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(request()), capture_output=True, check=True
    )
    answer = pickle.loads(done.stdout)
    assert answer.id == "changed"
    assert answer.raw_input_contents == [b"\x00\xff"]


class RoutedServer(grpc.aio._server.Server):
    """Puts its own behaviour into the handlers it is given, like Ray Serve's server."""

    def __init__(self) -> None:
        super().__init__(None, (), (), (), None, None)
        self.seen: dict[str, Any] = {}

    def _route(self, name: str, handler: Any) -> Any:
        self.seen[name] = handler

        async def behaviour(message: Any, context: Any) -> bytes:
            return codec.ServerLiveResponse(live=True).SerializeToString()

        return handler._replace(response_serializer=None, unary_unary=behaviour)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        if "grpc.reflection" not in next(iter(handlers[0]._method_handlers)):
            handlers[0]._method_handlers = {
                name: self._route(name, handler)
                for name, handler in handlers[0]._method_handlers.items()
            }
        super().add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        if "grpc.reflection" not in service:
            handlers = {
                name: self._route(f"/{service}/{name}", handler)
                for name, handler in handlers.items()
            }
        super().add_registered_method_handlers(service, handlers)


def test_a_server_that_routes_like_rays_with_reflection() -> None:
    async def serve() -> tuple[Any, dict[str, Any]]:
        server = RoutedServer()
        codec.add_GRPCInferenceServiceServicer_to_server(Mock(), server)
        reflection.enable_server_reflection(
            [grpc_messages.SERVICE.full_name, reflection.SERVICE_NAME], server
        )
        port = server.add_insecure_port("localhost:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                return codec.ServerLiveResponse.FromString(await call(b"")), server.seen
        finally:
            await server.stop(None)

    answer, seen = asyncio.run(serve())
    assert answer.live
    assert sorted(seen) == sorted(
        f"/inference.GRPCInferenceService/{method.name}" for method in grpc_messages.SERVICE.methods
    )
    infer = seen["/inference.GRPCInferenceService/ModelInfer"]
    assert type(infer.request_deserializer(b"")) is codec.ModelInferRequest
    assert seen["/inference.GRPCInferenceService/ModelStreamInfer"].request_streaming
