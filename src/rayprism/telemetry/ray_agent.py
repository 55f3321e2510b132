"""Where Ray's metrics agent of this node is, and a channel to it."""

from __future__ import annotations

import json

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX
from ray.experimental import internal_kv

__all__ = ["find_agent", "open_channel"]

_OPTIONS = (
    # An address of this node: never through the proxy that the environment may name.
    ("grpc.enable_http_proxy", 0),
    # Or a new channel would inherit how long an old one was told to leave the address alone.
    ("grpc.use_local_subchannel_pool", 1),
)


def find_agent() -> str | None:
    """The address that the agent of this process' node has registered; None where it has not.

    It is there some seconds after the node, changes when the agent is started again, and never
    comes where Ray is installed without its dashboard. It asks the head node, and waits for it.

    Raises:
        Exception: Of Ray: the head node does not answer, or this process is not in a cluster.
    """
    node_id = ray.get_runtime_context().get_node_id()
    value = internal_kv._internal_kv_get(
        f"{DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX}{node_id}", namespace=KV_NAMESPACE_DASHBOARD
    )
    if value is None:
        return None
    host, _, port = json.loads(value)
    if port <= 0:  # an agent without a gRPC server, of a minimal Ray
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_channel(address: str) -> grpc.Channel:
    """A channel with TLS and the cluster's token, where Ray is told to use them."""
    return init_grpc_channel(address, _OPTIONS)
