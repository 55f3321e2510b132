"""What an operator writes: every fault is found at once, with its path and how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayprism.errors import ConfigInvalid
from rayprism.serving.settings import (
    DEPLOYMENT_NAME,
    REPOSITORY_VARIABLE,
    ModelArgs,
    UserConfig,
    parse_args,
    parse_user_config,
)

NAN, INFINITY = float("nan"), float("inf")
FINE = {"model": "tiny", "version": 1}


def faults_in(parse: Callable[..., Any], raw: Any, prefix: str = "") -> dict[str, str]:
    """Faults by path."""
    with pytest.raises(ConfigInvalid) as caught:
        parse(raw, prefix)
    return {fault.path: fault.message for fault in caught.value.faults}


ARGS_FAULTS: list[tuple[Any, str, str]] = [
    # raw, path, a telling word
    ({"version": 1}, "model", "required"),
    ({"model": "tiny"}, "version", "required"),
    ({**FINE, "model": ""}, "model", "letters, digits"),
    ({**FINE, "model": "a/b"}, "model", "'a/b'"),
    ({**FINE, "model": ".."}, "model", "no '..'"),
    ({**FINE, "model": "a..b"}, "model", "no '..'"),
    ({**FINE, "model": "-tiny"}, "model", "starting with a letter or digit"),
    ({**FINE, "model": "tiny\n"}, "model", "letters, digits"),
    ({**FINE, "model": "t" * 129}, "model", "at most 128"),
    ({**FINE, "model": "größe"}, "model", "letters, digits"),
    ({**FINE, "model": 3}, "model", "valid string; got 3"),
    ({**FINE, "model": None}, "model", "valid string; got None"),
    ({**FINE, "version": 0}, "version", "greater than or equal to 1"),
    ({**FINE, "version": -1}, "version", "greater than or equal to 1"),
    ({**FINE, "version": "0"}, "version", "greater than or equal to 1"),
    ({**FINE, "version": True}, "version", "whole number from 1"),
    ({**FINE, "version": 1.0}, "version", "whole number from 1"),
    ({**FINE, "version": "latest"}, "version", "'latest'"),
    ({**FINE, "version": "1.0"}, "version", "'1.0'"),
    ({**FINE, "version": " 1"}, "version", "' 1'"),
    ({**FINE, "version": "+1"}, "version", "'+1'"),
    ({**FINE, "version": "1_0"}, "version", "'1_0'"),
    ({**FINE, "version": "٣"}, "version", "'٣'"),
    ({**FINE, "version": "²"}, "version", "'²'"),
    ({**FINE, "version": "1" * 5000}, "version", "5000 digits"),
    ({**FINE, "version": [1]}, "version", "valid integer; got [1]"),
    ({**FINE, "version": None}, "version", "valid integer; got None"),
    ({**FINE, "repository": "models"}, "repository", "absolute path"),
    ({**FINE, "repository": "./models"}, "repository", REPOSITORY_VARIABLE),
    ({**FINE, "repository": "~/models"}, "repository", "rayprism up --repository"),
    ({**FINE, "repository": ""}, "repository", "absolute path"),
    ({**FINE, "repository": 7}, "repository", "valid string; got 7"),
    ({**FINE, "allow_code": "no"}, "allow_code", "valid boolean; got 'no'"),
    ({**FINE, "allow_code": "true"}, "allow_code", "valid boolean"),
    ({**FINE, "allow_code": 1}, "allow_code", "valid boolean; got 1"),
    ({**FINE, "allow_code": None}, "allow_code", "valid boolean; got None"),
    ({**FINE, "device": "gpu"}, "device", "'auto', 'cpu' or 'cuda'; got 'gpu'"),
    ({**FINE, "device": "CPU"}, "device", "'cpu'"),
    ({**FINE, "device": None}, "device", "got None"),
    ({**FINE, "options": [1]}, "options", "valid dictionary; got [1]"),
    ({**FINE, "options": None}, "options", "got None"),
    ({**FINE, "versions": 1}, "versions", "Did you mean 'version'?"),
    ({**FINE, "Allow_Code": True}, "Allow_Code", "Did you mean 'allow_code'?"),
    ({**FINE, "user_config": {}}, "user_config", "unknown key. Allowed: model, version"),
    ({**FINE, 1: 2}, "[1]", "Keys should be strings"),
    (None, "", "got None, allowed is a mapping"),
    ([], "", "got [], allowed is a mapping"),
    ("tiny", "", "got 'tiny', allowed is a mapping"),
    ("x" * 5000, "", "allowed is a mapping"),
]


@pytest.mark.parametrize(("raw", "path", "word"), ARGS_FAULTS)
def test_faults_in_args(raw: Any, path: str, word: str) -> None:
    faults = faults_in(parse_args, raw)
    assert list(faults) == [path]
    assert word in faults[path]
    assert len(faults[path]) < 400, "also where the value is long"


NUMBERS = ["max_batch_rows", "max_batch_cost", "max_queue_rows", "max_body_bytes"]
NUMBERS += ["priority_levels", "default_priority"]

CONFIG_FAULTS: list[tuple[Any, str, str]] = [
    *(({name: 0}, name, "greater than or equal to 1") for name in NUMBERS),
    *(({name: True}, name, "valid integer; got True") for name in NUMBERS),
    *(({name: "2000"}, name, "valid integer; got '2000'") for name in NUMBERS),
    *(({name: 2000.0}, name, "valid integer; got 2000.0") for name in NUMBERS),
    *(({name: [1]}, name, "valid integer; got [1]") for name in NUMBERS),
    ({"max_queue_rows": "1e3"}, "max_queue_rows", "'1e3'"),
    ({"max_queue_rows": None}, "max_queue_rows", "valid integer; got None"),
    ({"max_queue_rows": 10_000_001}, "max_queue_rows", "less than or equal to 10000000"),
    ({"max_batch_rows": 1_000_001}, "max_batch_rows", "less than or equal to 1000000"),
    ({"max_body_bytes": 1023}, "max_body_bytes", "greater than or equal to 1024"),
    ({"max_body_bytes": "64 MiB"}, "max_body_bytes", "'64 MiB'"),
    ({"max_body_bytes": 2**63}, "max_body_bytes", "less than or equal to 1099511627776"),
    ({"max_delay_s": -0.001}, "max_delay_s", "greater than or equal to 0"),
    ({"max_delay_s": 61}, "max_delay_s", "less than or equal to 60"),
    ({"max_delay_s": NAN}, "max_delay_s", "got nan"),
    ({"max_delay_s": False}, "max_delay_s", "valid number; got False"),
    ({"max_delay_s": "5ms"}, "max_delay_s", "valid number; got '5ms'"),
    ({"default_timeout_s": 0}, "default_timeout_s", "greater than 0"),
    ({"default_timeout_s": -1}, "default_timeout_s", "greater than 0"),
    ({"default_timeout_s": NAN}, "default_timeout_s", "got nan"),
    ({"default_timeout_s": INFINITY}, "default_timeout_s", "less than or equal to 86400"),
    ({"default_timeout_s": True}, "default_timeout_s", "valid number; got True"),
    ({"default_timeout_s": None}, "default_timeout_s", "valid number; got None"),
    ({"default_timeout_s": "60"}, "default_timeout_s", "valid number; got '60'"),
    ({"priority_levels": 101}, "priority_levels", "less than or equal to 100"),
    ({"default_priority": 4}, "default_priority", "at most priority_levels, which is 3; got 4"),
    ({"priority_levels": 1}, "default_priority", "at most priority_levels, which is 1; got 2"),
    ({"execution": "threads"}, "execution", "'auto', 'inline' or 'thread'; got 'threads'"),
    ({"execution": True}, "execution", "got True"),
    ({"max_queue_row": 9}, "max_queue_row", "Did you mean 'max_queue_rows'?"),
    ({"MAX_QUEUE_ROWS": 9}, "MAX_QUEUE_ROWS", "Did you mean 'max_queue_rows'?"),
    ({"timeout_s": 9}, "timeout_s", "unknown key. Did you mean 'default_timeout_s'?"),
    ({"num_replicas": 2}, "num_replicas", "Allowed: max_batch_rows, max_batch_cost"),
    ({"": 2}, "", "unknown key"),
    ({"a.b": 2}, "a.b", "unknown key"),
    ({None: 2}, "None", "Keys should be strings"),
    ([{"max_queue_rows": 5}], "", "allowed is a mapping"),
    ("max_queue_rows: 5", "", "allowed is a mapping"),
    (False, "", "got False, allowed is a mapping"),
]


@pytest.mark.parametrize(("raw", "path", "word"), CONFIG_FAULTS)
def test_faults_in_user_config(raw: Any, path: str, word: str) -> None:
    faults = faults_in(parse_user_config, raw)
    assert list(faults) == [path]
    assert word in faults[path]


def test_every_fault_is_told_at_once_with_its_path_in_the_file() -> None:
    prefix = "applications[2].deployments[0].user_config"
    raw = {"max_queue_row": 1, "max_delay_s": -1, "execution": "x", "priority_levels": 0}
    faults = faults_in(parse_user_config, raw, prefix)
    assert set(faults) == {f"{prefix}.{name}" for name in raw}
    assert "Did you mean 'max_queue_rows'" in faults[f"{prefix}.max_queue_row"]
    assert set(faults_in(parse_args, {}, "args")) == {"args.model", "args.version"}
    assert set(faults_in(parse_args, None, "applications[2].args")) == {"applications[2].args"}


def test_the_message_names_the_source() -> None:
    with pytest.raises(ConfigInvalid, match=r"^args: 2 faults\n  model: .*\n  version: "):
        parse_args({})
    with pytest.raises(ConfigInvalid, match=r"^user_config: 1 fault\n  execution: "):
        parse_user_config({"execution": "x"})


def test_defaults() -> None:
    assert parse_args(FINE).model_dump() == {
        "model": "tiny",
        "version": 1,
        "repository": None,
        "allow_code": False,
        "device": "auto",
        "options": {},
    }
    want = {
        "max_batch_rows": None,
        "max_batch_cost": None,
        "max_delay_s": None,
        "max_queue_rows": 2048,
        "default_timeout_s": 60.0,
        "max_body_bytes": 64 * 1024 * 1024,
        "priority_levels": 3,
        "default_priority": 2,
        "execution": None,
        "traffic": None,
        "telemetry": {
            "log_percent": 0.0,
            "trace_percent": 100.0,
            "p99_target_s": None,
            "availability_percent": 99.9,
        },
    }
    for nothing in (None, {}):
        assert parse_user_config(nothing).model_dump() == want
    assert DEPLOYMENT_NAME == "model"


@pytest.mark.parametrize(
    ("raw", "name", "want"),
    [
        ("max_delay_s: 0", "max_delay_s", 0.0),
        ("max_delay_s: 0.005", "max_delay_s", 0.005),
        ("max_delay_s: 60", "max_delay_s", 60.0),
        ("max_delay_s:", "max_delay_s", None),
        ("default_timeout_s: 86400", "default_timeout_s", 86_400.0),
        ("max_queue_rows: 10_000_000", "max_queue_rows", 10_000_000),
        ("max_batch_rows: 1", "max_batch_rows", 1),
        ("max_body_bytes: 1024", "max_body_bytes", 1024),
        ("{priority_levels: 1, default_priority: 1}", "priority_levels", 1),
        ("{default_priority: 100, priority_levels: 100}", "default_priority", 100),
        ("execution: inline", "execution", "inline"),
    ],
)
def test_what_yaml_gives_is_taken(raw: str, name: str, want: Any) -> None:
    assert getattr(parse_user_config(yaml.safe_load(raw)), name) == want


@pytest.mark.parametrize("version", [3, "3", "03"])
def test_a_version_may_be_written_as_a_string(version: Any) -> None:
    assert parse_args({**FINE, "version": version}).version == 3


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        parse_args(FINE).version = 2
    with pytest.raises(ValidationError):
        parse_user_config({}).max_queue_rows = 2


def test_args_survive_the_way_to_the_replica() -> None:
    args = parse_args({**FINE, "version": "7", "repository": "/models", "allow_code": True})
    assert ModelArgs.model_validate(args.model_dump(mode="json")) == args


def test_the_repository_is_what_args_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPOSITORY_VARIABLE, "/elsewhere")
    assert parse_args({**FINE, "repository": "/models"}).repository_path() == Path("/models")


def test_the_repository_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse_args(FINE)
    monkeypatch.setenv(REPOSITORY_VARIABLE, "/models")
    assert args.repository_path() == Path("/models"), "read when it is needed, not when parsed"


@pytest.mark.parametrize("value", [None, ""])
def test_no_repository_at_all(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPOSITORY_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(REPOSITORY_VARIABLE, value)
    with pytest.raises(ConfigInvalid) as caught:
        parse_args(FINE).repository_path()
    (fault,) = caught.value.faults
    assert fault.path == "repository"
    assert REPOSITORY_VARIABLE in fault.message
    assert "rayprism up --repository PATH" in fault.message


_scalars = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=8)
_keys = st.sampled_from([*UserConfig.model_fields, *ModelArgs.model_fields]) | st.text(max_size=8)
_raw = st.dictionaries(_keys, _scalars | st.lists(_scalars, max_size=2), max_size=6) | _scalars


@given(_raw)
def test_whatever_is_written_is_parsed_or_refused(raw: Any) -> None:
    """No other exception, no fault without words, and nothing taken for something else."""
    for parse in (parse_args, parse_user_config):
        faults = None
        try:
            parsed = parse(raw)
        except ConfigInvalid as error:
            faults = error.faults
        if faults is not None:
            assert faults
            assert all(fault.message for fault in faults)
            continue
        for name, value in (raw or {}).items():
            if name != "version":
                assert getattr(parsed, name) == value
                assert isinstance(getattr(parsed, name), bool) == isinstance(value, bool)


# --- traffic


def candidates(*weights: Any, **extra: Any) -> dict[str, Any]:
    """Traffic to versions 2, 3, ... with these weights."""
    entries = [{"version": 2 + place, "weight": weight} for place, weight in enumerate(weights)]
    return {"candidates": [{**entry, **extra} for entry in entries]}


def shadow(sample: Any, **extra: Any) -> dict[str, Any]:
    """A shadow, version 5, that gets this share."""
    return {"shadow": [{"version": 5, "sample": sample, **extra}]}


HEADERS = ["", "x user", "x_user", "x:user", "-x", "x\n", "größe", "x" * 65, 5, None, ["x"]]

TRAFFIC_FAULTS: list[tuple[Any, str, str]] = [
    # raw, path under `traffic`, a telling word
    (candidates(0.005), ".candidates[0].weight", "at most two decimals, as in 0.25; got 0.005"),
    (candidates(33.333), ".candidates[0].weight", "at most two decimals"),
    (candidates(5, 0.125), ".candidates[1].weight", "at most two decimals"),
    (candidates(-0.01), ".candidates[0].weight", "greater than or equal to 0"),
    (candidates(100.01), ".candidates[0].weight", "less than or equal to 100"),
    (candidates(NAN), ".candidates[0].weight", "got nan"),
    (candidates(INFINITY), ".candidates[0].weight", "less than or equal to 100"),
    (candidates(True), ".candidates[0].weight", "valid number; got True"),
    (candidates("5"), ".candidates[0].weight", "valid number; got '5'"),
    (candidates("5 %"), ".candidates[0].weight", "valid number; got '5 %'"),
    (candidates(None), ".candidates[0].weight", "valid number; got None"),
    (candidates([5]), ".candidates[0].weight", "valid number; got [5]"),
    (candidates(60, 40.01), ".candidates", "100.01 % together, allowed are 100"),
    (candidates(100, 100), ".candidates", "200 % together"),
    ({"candidates": [{"version": 2}]}, ".candidates[0].weight", "required"),
    ({"candidates": [{"weight": 2}]}, ".candidates[0].version", "required"),
    (candidates(5, version="latest"), ".candidates[0].version", "'latest'"),
    (candidates(5, version=0), ".candidates[0].version", "greater than or equal to 1"),
    (candidates(5, version=True), ".candidates[0].version", "whole number from 1"),
    (candidates(5, version=4.0), ".candidates[0].version", "whole number from 1"),
    (candidates(5, 5, version=4), ".candidates", "version 4 is given twice"),
    (
        {"candidates": [{"version": "4", "weight": 1}, {"version": 4, "weight": 1}]},
        ".candidates",
        "version 4 is given twice",
    ),
    (
        {"shadow": [{"version": 5, "sample": 1}, {"version": "05", "sample": 2}]},
        ".shadow",
        "version 5 is given twice",
    ),
    (candidates(5, wieght=5), ".candidates[0].wieght", "unknown key. Did you mean 'weight'?"),
    (candidates(5, sample=5), ".candidates[0].sample", "Allowed: version, weight, allow_sig"),
    (
        candidates(5, allow_signature_changes=True),
        ".candidates[0].allow_signature_changes",
        "Did you mean 'allow_signature_change'?",
    ),
    (
        candidates(5, allow_signature_change="yes"),
        ".candidates[0].allow_signature_change",
        "valid boolean; got 'yes'",
    ),
    (shadow(5, sampel=1), ".shadow[0].sampel", "Did you mean 'sample'?"),
    (shadow(5, weight=1), ".shadow[0].weight", "Allowed: version, sample"),
    (shadow(0.001), ".shadow[0].sample", "at most two decimals"),
    (shadow("10"), ".shadow[0].sample", "valid number; got '10'"),
    (shadow(True), ".shadow[0].sample", "valid number; got True"),
    ({"candidate": []}, ".candidate", "Did you mean 'candidates'?"),
    ({"max_queue_rows": 5}, ".max_queue_rows", "Allowed: candidates, sticky, shadow"),
    ({"sticky": {"header": "x", "key": "y"}}, ".sticky.key", "unknown key. Allowed: header"),
    ({"sticky": {}}, ".sticky.header", "required"),
    *(({"sticky": {"header": name}}, ".sticky.header", f"got {name!r}") for name in HEADERS),
    ({"candidate_timeout_s": 0}, ".candidate_timeout_s", "greater than 0"),
    ({"candidate_timeout_s": "1s"}, ".candidate_timeout_s", "got '1s'"),
    ({"max_shadow_requests": 0}, ".max_shadow_requests", "greater than or equal to 1"),
    ({"max_shadow_requests": True}, ".max_shadow_requests", "got True"),
    ({"max_shadow_bytes": 100}, ".max_shadow_bytes", "greater than or equal to 1024"),
]


@pytest.mark.parametrize(("raw", "path", "word"), TRAFFIC_FAULTS)
def test_faults_in_traffic(raw: Any, path: str, word: str) -> None:
    faults = faults_in(parse_user_config, {"traffic": raw}, "deployments[0].user_config")
    path = f"deployments[0].user_config.traffic{path}"
    assert list(faults) == [path]
    assert word in faults[path]


def test_every_fault_in_traffic_is_told_at_once() -> None:
    raw = {**candidates(5.555, True), **shadow("1", sampel=1), "sticky": {"heder": "x y"}}
    faults = faults_in(parse_user_config, {"traffic": raw})
    assert set(faults) == {
        "traffic.candidates[0].weight",
        "traffic.candidates[1].weight",
        "traffic.shadow[0].sample",
        "traffic.shadow[0].sampel",
        "traffic.sticky.header",
        "traffic.sticky.heder",
    }
    assert "Did you mean 'header'?" in faults["traffic.sticky.heder"]


def test_traffic_as_people_write_it() -> None:
    written = """
    traffic:
      candidates:
      - {version: "4", weight: 5}
      - {version: 6, weight: 0.25, allow_signature_change: true}
      sticky: {header: x-user-id}
      shadow: [{version: "5", sample: 12.5}]
      candidate_timeout_s: 0.2
    """
    traffic = parse_user_config(yaml.safe_load(written)).traffic
    assert traffic is not None
    assert [(item.version, item.slots) for item in traffic.candidates] == [(4, 500), (6, 25)]
    assert [item.allow_signature_change for item in traffic.candidates] == [False, True]
    assert traffic.sticky is not None
    assert traffic.sticky.header == "x-user-id"
    assert [(item.version, item.sample) for item in traffic.shadow] == [(5, 12.5)]
    assert traffic.candidate_timeout_s == 0.2


def test_traffic_without_anybody() -> None:
    traffic = parse_user_config({"traffic": {}}).traffic
    assert traffic is not None
    assert traffic.model_dump() == {
        "candidates": (),
        "sticky": None,
        "shadow": (),
        "candidate_timeout_s": None,
        "max_shadow_requests": 32,
        "max_shadow_bytes": 32 * 1024 * 1024,
    }


def slots_of(*weights: Any) -> list[int]:
    traffic = parse_user_config({"traffic": candidates(*weights)}).traffic
    assert traffic is not None
    return [item.slots for item in traffic.candidates]


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_weights_are_exact_in_hundredths(slots: int) -> None:
    """Also where the decimal is no binary fraction: a hundred times 0.29 is a bit less than 29."""
    assert slots_of(yaml.safe_load(f"{slots // 100}.{slots % 100:02}")) == [slots]


@settings(deadline=None)
@given(st.integers(0, 100_000).filter(lambda thousandths: thousandths % 10))
def test_a_third_decimal_is_refused(thousandths: int) -> None:
    written = yaml.safe_load(f"{thousandths // 1000}.{thousandths % 1000:03}")
    faults = faults_in(parse_user_config, {"traffic": candidates(written)})
    assert list(faults) == ["traffic.candidates[0].weight"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
def test_weights_are_at_most_all_together(slots: list[int]) -> None:
    weights = [part / 100 for part in slots]
    if sum(slots) > 10_000:
        faults = faults_in(parse_user_config, {"traffic": candidates(*weights)})
        assert list(faults) == ["traffic.candidates"]
    else:
        assert slots_of(*weights) == slots


@pytest.mark.parametrize("weights", [(33.33, 33.33, 33.34), (0.1, 0.2, 99.7), (100,), (100, 0)])
def test_all_of_the_requests_may_be_shared_out(weights: tuple[float, ...]) -> None:
    assert sum(slots_of(*weights)) == 10_000


@pytest.mark.parametrize("name", ["x-user-id", "Cookie", "X1", "a", "x" * 64])
def test_header_names(name: str) -> None:
    traffic = parse_user_config({"traffic": {"sticky": {"header": name}}}).traffic
    assert traffic is not None
    assert traffic.sticky is not None
    assert traffic.sticky.header == name


def test_a_version_may_be_candidate_and_shadow() -> None:
    """Odd, but not wrong: `rayprism check` warns of it."""
    assert parse_user_config({"traffic": {**candidates(1, version=5), **shadow(1)}}).traffic
