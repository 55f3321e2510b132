"""Asks a running fleet about a few flights, over every wire, with stock clients.

    python examples/flights/client.py

The clients are NVIDIA's `tritonclient`, which knows nothing of rayprism: the protocol is the Open
Inference Protocol.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flights_data as data
import numpy as np
import numpy.typing as npt
import pandas as pd
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

OUTPUT = "delayed_probability"
SAME = 1e-6
"""Answers over different wires may differ by this much: JSON prints decimals."""

Probabilities = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="HTTP address of the fleet")
    parser.add_argument("--grpc-url", default="127.0.0.1:9000", help="gRPC address of the fleet")
    parser.add_argument("--model", default="flights")
    parser.add_argument(
        "--version", default="", help="a version that has a route of its own (default: the model's)"
    )
    arguments = parser.parse_args()

    flights = data.example_flights(data.load_flights())
    wires: dict[str, Callable[[], Probabilities]] = {
        "HTTP, JSON": lambda: ask_http(arguments, flights, binary=False),
        "HTTP, binary": lambda: ask_http(arguments, flights, binary=True),
        "HTTP, binary, gzip": lambda: ask_http(arguments, flights, binary=True, compression="gzip"),
        "gRPC": lambda: ask_grpc(arguments, flights),
    }
    answers = {}
    for wire, ask in wires.items():
        began = time.perf_counter()
        try:
            answers[wire] = ask()
        except (InferenceServerException, OSError) as error:
            sys.exit(
                f"{wire}: {error}\nIs a fleet up that serves {arguments.model!r}, with HTTP at "
                f"{arguments.url} and gRPC at {arguments.grpc_url}?"
            )
        took_s = time.perf_counter() - began
        print(f"{wire:<20}{len(flights)} flights, {took_s * 1e3:.1f} ms with connecting")
    first = answers["HTTP, JSON"]
    print(f"\n{describe_answers(flights, first)}\n")
    differing = [wire for wire, answer in answers.items() if np.abs(answer - first).max() > SAME]
    if differing:
        sys.exit(f"other answers came over {', '.join(differing)}: {answers}")
    print("The same answers came over every wire. The same with curl:\n")
    print(
        f"  curl {infer_url(arguments)} -H 'Content-Type: application/json' \\\n"
        "    -d @examples/flights/rows.json"
    )


def ask_http(
    arguments: argparse.Namespace,
    flights: pd.DataFrame,
    *,
    binary: bool,
    compression: str | None = None,
) -> Probabilities:
    """Asks over HTTP, with tensors as JSON or as bytes, and both ways compressed or not."""
    with tritonclient.http.InferenceServerClient(plain_address(arguments.url)) as client:
        answer = client.infer(
            arguments.model,
            _tensors(tritonclient.http, flights, binary_data=binary),
            model_version=arguments.version,
            outputs=[tritonclient.http.InferRequestedOutput(OUTPUT, binary_data=binary)],
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
    return np.asarray(answer.as_numpy(OUTPUT))


def ask_grpc(arguments: argparse.Namespace, flights: pd.DataFrame) -> Probabilities:
    """Asks over gRPC, where metadata names the application: the path does not."""
    application = "-".join(filter(None, (arguments.model, arguments.version)))
    with tritonclient.grpc.InferenceServerClient(plain_address(arguments.grpc_url)) as client:
        answer = client.infer(
            arguments.model,
            _tensors(tritonclient.grpc, flights),
            model_version=arguments.version,
            headers={"application": application},
        )
    return np.asarray(answer.as_numpy(OUTPUT))


def _tensors(wire: ModuleType, flights: pd.DataFrame, **how: bool) -> list[Any]:
    tensors = []
    for name, array in data.model_inputs(flights).items():
        tensor = wire.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, **how)
        tensors.append(tensor)
    return tensors


def plain_address(url: str) -> str:
    """`host:port`, which is how tritonclient wants it."""
    return url.removeprefix("http://").removeprefix("grpc://").rstrip("/")


def infer_url(arguments: argparse.Namespace) -> str:
    """Where a request goes over HTTP."""
    version = f"/versions/{arguments.version}" if arguments.version else ""
    return f"http://{plain_address(arguments.url)}/v2/models/{arguments.model}{version}/infer"


def describe_answers(flights: pd.DataFrame, probabilities: Probabilities) -> str:
    """A table of the answers beside what really happened."""
    head = f"{'flight':<9}{'route':<12}{'scheduled':<18}{'predicted':>10}   what happened"
    lines = [head, "-" * (len(head) + 12)]
    for flight, probability in zip(flights.itertuples(), probabilities, strict=True):
        scheduled = (
            f"{flight.year}-{flight.month:02}-{flight.day:02} {flight.hour:02}:{flight.minute:02}"
        )
        lines.append(
            f"{f'{flight.carrier} {flight.flight}':<9}{f'{flight.origin} > {flight.dest}':<12}"
            f"{scheduled:<18}{probability:>10.1%}   {_describe_arrival(flight.arr_delay)}"
        )
    return "\n".join(lines)


def _describe_arrival(delay_minutes: float) -> str:
    if np.isnan(delay_minutes):
        return "cancelled or diverted"
    minutes = f"{abs(delay_minutes):.0f} minute{'' if abs(delay_minutes) == 1 else 's'}"
    if delay_minutes >= data.DELAYED_MINUTES:
        return f"late: {minutes}"
    return f"on time, {minutes} {'after' if delay_minutes > 0 else 'before'} schedule"


if __name__ == "__main__":
    main()
