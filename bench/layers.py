"""Where the CPU time of a small request goes, layer by layer: `python -m bench.layers`.

Servers that do a little more each are loaded with the same one-row JSON requests by wrk, in turn;
what a layer costs is the difference between two of them. No Ray and no proxy: those are in
`python -m bench run overhead`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvicorn
import uvloop

from bench import machine, tiny_model
from bench.cluster import free_ports
from bench.load import drive
from bench.tables import machine_line, table
from rayprism.models.loader import load_model
from rayprism.models.repository import Repository
from rayprism.protocol.http import decode_infer_request, encode_infer_response
from rayprism.serving.http import ModelApp
from rayprism.serving.lane import Lane
from rayprism.serving.lane_connection import LaneConnection
from rayprism.serving.service import ModelService
from rayprism.serving.settings import UserConfig
from rayprism.serving.telemetry import ReplicaTelemetry

__all__ = ["LAYERS", "main", "render"]

_ROOT = Path(__file__).resolve().parent.parent
_OUTPUT = _ROOT / "bench" / "results" / "layers.json"
_PREFIX = f"/v2/models/{tiny_model.MODEL}"

LAYERS = {
    "sockets": "uvloop reads and writes the bytes",
    "http": "+ llhttp and the fast lane: head, answer's head",
    "protocol": "+ JSON into arrays and back, checked",
    "batching": "+ request, queue, batches, statistics (the model is a constant)",
    "model": "+ ONNX Runtime",
    "telemetry": "+ metrics: what a replica does, but Ray's accounts",
    "uvicorn": "the same under uvicorn instead of the lane",
}
_ANSWER = (
    b'{"model_name":"tiny","model_version":"1","outputs":[{"name":"score","datatype":"FP32",'
    b'"shape":[1,1],"data":[0.35140353]}]}'
)
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"x-rayprism-version", b"1"),
    (b"content-length", b"%d" % len(_ANSWER)),
]
App = Callable[[Any], Any]


class _Sockets(asyncio.Protocol):
    """Knows only how long a request is: wrk sends each in one piece."""

    _answer = (
        b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 12:05:46 GMT\r\nserver: uvicorn\r\n"
        + b"".join(b"%b: %b\r\n" % header for header in _HEADERS)
        + b"x-request-id: 93b25db5-a19b-423b-93b5-7ce7fb10389c\r\n\r\n"
        + _ANSWER
    )

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._answer)


class _NoAccounts:
    """Stands for Serve's accounts, which need a replica."""

    prefix = _PREFIX
    is_plain = True

    def begin(self) -> bool:
        return True

    def end(self, status: int, took_s: float) -> None:
        pass


def _constant(body: Any) -> Any:
    return _HEADERS, _ANSWER


def _protocol(body: Any) -> Any:
    request = decode_infer_request(body)
    outputs = {tiny_model.OUTPUT: np.zeros((1, 1), np.float32)}
    answer, _ = encode_infer_response(tiny_model.MODEL, "1", request, outputs)
    return [*_HEADERS[:2], (b"content-length", b"%d" % len(answer))], answer


def _model_app(layer: str, folder: Path) -> ModelApp:
    model_file = folder / "tiny.onnx"
    tiny_model.write_onnx(model_file)
    tiny_model.push(model_file, folder / "models")
    version = Repository(folder / "models").version(tiny_model.MODEL, 1)
    model = load_model(version, allow_code=False)
    if layer == "batching":
        whole = np.zeros((64, 1), np.float32)
        model.run = (
            lambda batch: {  # type: ignore[method-assign]
                tiny_model.OUTPUT: whole[: len(batch[tiny_model.INPUT])]
            }
        )
    telemetry = ReplicaTelemetry(tiny_model.MODEL, "1", is_on=layer not in ("batching", "model"))
    return ModelApp(ModelService(model, UserConfig(), telemetry=telemetry))


def _lane_protocol(app: Any) -> Callable[[], asyncio.Protocol]:
    lane = Lane(app, _NoAccounts())  # type: ignore[arg-type]
    # uvicorn's protocol, as far as a connection of the lane needs it.
    state = types.SimpleNamespace(
        connections=set(),
        default_headers=[(b"date", b"Sun, 22 Nov 2026 12:05:46 GMT"), (b"server", b"uvicorn")],
    )

    class Web(asyncio.Protocol):
        server_state = state
        flow = types.SimpleNamespace(write_paused=False)
        timeout_keep_alive = 60

        def connection_made(self, transport: Any) -> None:
            LaneConnection(self, transport, lane).take()  # type: ignore[arg-type]

        def _unset_keepalive_if_required(self) -> None:
            pass

    return Web


async def _serve(layer: str, port: int, folder: Path) -> None:
    if layer == "uvicorn":
        config = uvicorn.Config(
            _model_app(layer, folder), port=port, lifespan="off", access_log=False, log_config=None
        )
        gc.collect()
        gc.freeze()
        await uvicorn.Server(config).serve()
        return
    if layer == "sockets":
        protocol: Callable[[], asyncio.Protocol] = _Sockets
    else:
        plain = {"http": _constant, "protocol": _protocol}.get(layer)
        protocol = _lane_protocol(_Plain(plain) if plain else _model_app(layer, folder))
    gc.collect()
    gc.freeze()
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", port)
    await server.serve_forever()


class _Plain:
    """Stands for an application: answers at once."""

    max_body_bytes = 1 << 20

    def __init__(self, app: App) -> None:
        self._app = app

    def infer_paths(self, prefix: str) -> tuple[str, ...]:
        return (f"{prefix}/infer",)

    def infer_now(self, path: str, headers: Any, body: Any, request_id: str, reply: Any) -> Any:
        asyncio.get_running_loop().call_soon(lambda: reply(200, *self._app(body)))
        return lambda: None


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table, and writes it; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    parser.add_argument("--serve", choices=list(LAYERS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        with tempfile.TemporaryDirectory() as folder:
            uvloop.run(_serve(given.serve, given.port, Path(folder)))
        return 0
    results = {
        **machine.describe(),
        "rounds": given.rounds,
        "seconds": given.seconds,
        "samples": _measure(given),
    }
    text = render(results)
    print(text)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(results, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(text)
    return 0


def _measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    servers = {}
    samples = []
    body = [tiny_model.infer_body()]
    try:
        for layer, port in zip(given.layers, free_ports(len(given.layers)), strict=True):
            command = [sys.executable, "-m", "bench.layers", "--serve", layer, "--port", str(port)]
            process = psutil.Popen(command)
            servers[layer] = (process, f"http://127.0.0.1:{port}{_PREFIX}/infer")
            _wait(port, process)
        for turn in range(given.rounds):
            for connections in given.connections:
                for layer, (process, url) in servers.items():
                    before = process.cpu_times()
                    sample = drive(
                        url, body, connections=connections, seconds=given.seconds, marker="layers"
                    )
                    after = process.cpu_times()
                    used_s = after.user + after.system - before.user - before.system
                    sample = {
                        "layer": layer,
                        "round": turn,
                        "connections": connections,
                        "rate": sample["rate"],
                        "cpu_us": used_s / sample["requests"] * 1e6,
                        "errors": sample["errors"],
                    }
                    samples.append(sample)
                    print(
                        f"round {turn + 1}, {connections} connections, {layer}: "
                        f"{sample['cpu_us']:.1f} us, {sample['rate']:,.0f}/s",
                        flush=True,
                    )
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait(timeout=10)
    return samples


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    async def connect() -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}") from None
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return

    asyncio.run(asyncio.wait_for(connect(), 60))


def render(results: dict[str, Any]) -> str:
    """The table of a run: what each layer's server takes, and what that is more than the last."""
    samples = results["samples"]
    connections = list(dict.fromkeys(sample["connections"] for sample in samples))
    header = ["CPU time of the server per request"]
    for count in connections:
        header += [f"{count} conn.", "more"]
    rows = []
    before: dict[int, float] = {}
    for layer in dict.fromkeys(sample["layer"] for sample in samples):
        cells = [LAYERS[layer]]
        for count in connections:
            used = statistics.median(
                sample["cpu_us"]
                for sample in samples
                if sample["layer"] == layer and sample["connections"] == count
            )
            cells += [f"{used:.1f} us", f"{used - before.get(count, 0.0):+.1f}"]
            if layer != "uvicorn":
                before[count] = used
        rows.append(cells)
    how = {"command": "python -m bench.layers", "scenario": {"rounds": results["rounds"]}}
    line = machine_line({**results, **how})
    return f"{line}\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
