"""Compiles `oip.proto` to `oip.binpb`, or says whether that is current.

    python -m rayprism.protocol.grpc_build            writes it
    python -m rayprism.protocol.grpc_build --check    exits with 1 where it is stale

Needs grpcio-tools, which only developers have.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["DESCRIPTOR_FILE", "PROTO_FILE", "compile_proto", "main"]

PROTO_FILE = Path(__file__).with_name("oip.proto")
DESCRIPTOR_FILE = Path(__file__).with_name("oip.binpb")


def compile_proto() -> bytes:
    """The serialized FileDescriptorSet of `oip.proto`.

    Raises:
        RuntimeError: It does not compile; the compiler wrote why to stderr.
    """
    from grpc_tools import protoc  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "oip.binpb"
        status = protoc.main(
            ["protoc", f"-I{PROTO_FILE.parent}", f"--descriptor_set_out={target}", PROTO_FILE.name]
        )
        if status:
            raise RuntimeError(f"{PROTO_FILE} does not compile")
        return target.read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module.

    Returns:
        The exit status: 0 where the file was written, or is current.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) not in ([], ["--check"]):
        print("usage: python -m rayprism.protocol.grpc_build [--check]", file=sys.stderr)
        return 2
    compiled = compile_proto()
    if not arguments:
        DESCRIPTOR_FILE.write_bytes(compiled)
        print(f"wrote {DESCRIPTOR_FILE}")
        return 0
    if DESCRIPTOR_FILE.exists() and DESCRIPTOR_FILE.read_bytes() == compiled:
        print(f"{DESCRIPTOR_FILE} is current")
        return 0
    print(
        f"{DESCRIPTOR_FILE} is stale: run python -m rayprism.protocol.grpc_build", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
