"""Ray's fake multi-node provider, but with each node on a machine of its own.

Ray's own starts all nodes beside the head, where their proxies would share one port. The autoscaler
loads this one on the head (`provider: {type: external}`). It asks the tests for machines, as others
ask a cloud.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

__all__ = ["MachineProvider"]


class MachineProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """Machines of the tests, as nodes."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        head = self._nodes[self._head_node_id]
        head["tags"][TAG_RAY_USER_NODE_TYPE] = provider_config["head_node_type"]

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        with self.lock:
            node_id = self._next_hex_node_id()
            self._ask(
                "POST", node_id, {"type": tags[TAG_RAY_USER_NODE_TYPE], "resources": resources}
            )
            self._nodes[node_id] = {"tags": tags, "id": node_id}

    def _terminate_node(self, node: dict[str, Any]) -> None:
        self._ask("DELETE", node["id"], {})

    def _ask(self, method: str, node_id: str, document: dict[str, Any]) -> None:
        url = f"{self.provider_config['endpoint']}/{node_id}"
        data = json.dumps(document).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=30):
            pass
