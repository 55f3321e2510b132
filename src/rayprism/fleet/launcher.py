"""Files for `ray up`: whether Ray takes them, asked without a cloud.

python -m rayprism.fleet.launcher cluster.yaml cluster-onprem.yaml
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rayprism.errors import ClusterError

__all__ = ["main", "prepare_cluster"]


def prepare_cluster(path: Path) -> dict[str, Any]:
    """What Ray makes of a file before it asks the provider for machines.

    Args:
        path: A file for `ray up`.

    Returns:
        The file with Ray's defaults, as its autoscaler gets it.

    Raises:
        ClusterError: Ray does not take it; says why.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    told = io.StringIO()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        # Ray tells much here that is about Docker, and aborts with what it has printed.
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            config: dict[str, Any] = prepare_config(document)
            validate_config(config)
    except Exception as error:
        text = str(error).strip() or told.getvalue().strip() or type(error).__name__
        reason = text.splitlines()[0]
        raise ClusterError(f"{path}: Ray does not take it: {reason}") from error
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks files; see the module.

    Returns:
        The exit status: 0 where Ray takes all of them.
    """
    paths = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if not paths:
        print("usage: python -m rayprism.fleet.launcher FILE...", file=sys.stderr)
        return 2
    status = 0
    for path in paths:
        try:
            config = prepare_cluster(path)
        except ClusterError as error:
            print(error, file=sys.stderr)
            status = 1
        else:
            types = config["available_node_types"]
            bounds = ", ".join(
                f"{name} {kind['min_workers']} to {kind['max_workers']}"
                for name, kind in types.items()
                if name != config["head_node_type"] or len(types) == 1
            )
            print(f"{path}: workers {bounds}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
