from __future__ import annotations

import pytest

from bench.load import LoadFailed, parse_output
from bench.processes import role_of

OUTPUT = """Running 5s test @ http://127.0.0.1:1/
  1 threads and 16 connections
BENCH {"requests":1000,"duration_s":2.000000,"bytes":5,"errors":{},"latency_s":{"p50":0.1}}
"""


def test_rate_is_requests_by_duration() -> None:
    result = parse_output(OUTPUT)
    assert result["rate"] == 500.0
    assert result["latency_s"] == {"p50": 0.1}


def test_no_line_is_a_failure() -> None:
    with pytest.raises(LoadFailed, match="no result"):
        parse_output("unable to connect")


def test_no_answer_is_a_failure() -> None:
    with pytest.raises(LoadFailed, match="no request was answered"):
        parse_output(OUTPUT.replace("1000", "0"))


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::ServeReplica:tiny:model"], "replica:tiny:model"),
        (["ray::ServeReplica:tiny:model.handle_request"], "replica:tiny:model"),
        (["/opt/bin/haproxy", "-db", "-f", "x"], "haproxy"),
        (["ray::ProxyActor"], "proxy"),
        (["raylet", "--haproxy"], "ray"),
        ([], "ray"),
    ],
)
def test_role_of_a_process(command: list[str], role: str) -> None:
    assert role_of(command) == role
