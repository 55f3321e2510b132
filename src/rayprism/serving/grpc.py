"""The gRPC side of a replica: `inference.GRPCInferenceService` as methods of the ingress class.

Ray Serve calls the method of the ingress class that is named like the RPC. An error is put on the
context and an empty answer returned: an exception would reach the client alike, but Ray would
write a stack trace into the log for each mistake of a client.
"""

from __future__ import annotations

from typing import Any

import grpc

from rayprism.errors import RequestError, Unsupported
from rayprism.protocol import grpc as codec
from rayprism.protocol.status import grpc_status, public_message
from rayprism.serving.service import ModelService

__all__ = ["GrpcMethods"]


class GrpcMethods:
    """The RPCs of one loaded version. `self.service` is set by the replica."""

    service: ModelService

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:
        """The process answers."""
        return codec.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:
        """The version that is served here is loaded."""
        return codec.ServerReadyResponse(ready=True)
