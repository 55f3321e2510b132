"""What a batch job is told: every fault at once, where it is, and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayprism.errors import ConfigInvalid
from rayprism.offline.spec import REPOSITORY_VARIABLE, JobSpec, load_spec, parse_spec

CONFIGS = Path(__file__).parents[2] / "batch" / "configs"


def job(**changes: Any) -> dict[str, Any]:
    """The smallest job, with parts of it changed: `input__format="csv"`."""
    said: dict[str, Any] = {
        "model": "flights",
        "version": "2",
        "input": {"uri": "data/*.parquet"},
        "output": {"uri": "out"},
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        part = said
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return said


def faults(**changes: Any) -> dict[str, str]:
    """What is wrong with a job: path to message."""
    with pytest.raises(ConfigInvalid) as caught:
        parse_spec(job(**changes))
    return {fault.path: fault.message for fault in caught.value.faults}


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


SMALLEST = """\
model: flights
version: 2
input: {uri: data/flights}
output: {uri: out}
"""


# --- what it says


def test_the_smallest_file_has_defaults_that_work(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, SMALLEST))
    assert (spec.model, spec.version, spec.device, spec.mode) == ("flights", 2, "auto", "auto")
    assert spec.input.uri == ("data/flights",)
    assert (spec.input.format, spec.input.columns, spec.input.partitioning) == (None, {}, "none")
    assert (spec.output.passthrough, spec.output.compression) == ((), "zstd")
    assert (spec.pool.min_actors, spec.pool.max_actors, spec.pool.gpus) == (1, 2, 0)
    assert (spec.limits.shard_rows, spec.limits.shard_bytes) == (None, None)
    assert (spec.limits.max_dead_letters, spec.limits.batch_rows) == (1_000, None)
    assert not spec.allow_code


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    text = """\
model: digits
version: "7"
repository: /models
allow_code: true
device: cuda
input:
  uri: [s3://bucket/a, "s3://bucket/b/*.csv"]
  format: csv
  columns: {dep_hour: hour, features: [a, b, c]}
  partitioning: hive
  csv: {delimiter: "\\t", newlines_in_values: true}
output:
  uri: s3://other/out
  passthrough: "*"
  partitioned: true
  prefix: predicted_
  row_position: true
  compression: none
pool: {min_actors: 2, max_actors: 4, initial_actors: 3, start_full: false, cpus: 0.5, gpus: 0.25}
limits:
  {batch_rows: 64, shard_rows: 1_000, shard_bytes: 4096, max_dead_letters: 0,
   max_memory_bytes: 2000000000}
mode: pipeline
"""
    spec = load_spec(write(tmp_path, text))
    assert spec.input.uri == ("s3://bucket/a", "s3://bucket/b/*.csv")
    assert spec.input.columns == {"dep_hour": ("hour",), "features": ("a", "b", "c")}
    assert spec.input.csv.delimiter == "\t"
    assert spec.output.passes_all
    assert spec.pool.first_actors == 3
    assert spec.limits.shard_rows == 1_000
    assert spec.repository_path() == Path("/models")


def test_images_have_a_size() -> None:
    spec = parse_spec(job(input__format="images", input__images={"size": [28, 24], "mode": "L"}))
    assert spec.input.images is not None
    assert (spec.input.images.size, spec.input.images.scale) == ((28, 24), 1 / 255)


@pytest.mark.parametrize(
    "file",
    sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("evaluate*"))),
    ids=lambda file: file.name,
)
def test_shipped_configs_are_right(file: Path) -> None:
    assert isinstance(load_spec(file), JobSpec)


@pytest.mark.parametrize(
    ("pool", "first"),
    [
        ({"max_actors": 5}, 5),
        ({"max_actors": 5, "start_full": False}, 1),
        ({"max_actors": 5, "min_actors": 2, "start_full": False}, 2),
        ({"max_actors": 5, "initial_actors": 3}, 3),
        ({"max_actors": 5, "initial_actors": 3, "start_full": False}, 3),
    ],
)
def test_how_many_actors_start(pool: dict[str, Any], first: int) -> None:
    assert parse_spec(job(pool=pool)).pool.first_actors == first


@pytest.mark.parametrize(
    ("changes", "prepares", "way"),
    [
        ({}, False, "stream"),
        ({}, True, "stream"),
        ({"pool__gpus": 1}, False, "stream"),
        ({"pool__gpus": 1}, True, "pipeline"),
        ({"input__images": {"size": [8, 8]}}, False, "stream"),
        ({"input__images": {"size": [8, 8]}, "pool__gpus": 0.5}, False, "pipeline"),
        ({"mode": "stream", "pool__gpus": 1}, True, "stream"),
        ({"mode": "pipeline"}, False, "pipeline"),
    ],
)
def test_the_rule_that_chooses_the_way(changes: dict[str, Any], prepares: bool, way: str) -> None:
    assert parse_spec(job(**changes)).way(prepares=prepares) == way


@pytest.mark.parametrize(
    ("changes", "prepares", "rows"),
    [
        ({}, False, 262_144),
        ({}, True, 2_048),
        ({"input__images": {"size": [8, 8]}}, False, 256),
        ({"input__images": {"size": [8, 8]}}, True, 256),
        ({"limits__shard_rows": 7}, True, 7),
        ({"limits__shard_rows": 7, "input__images": {"size": [8, 8]}}, False, 7),
    ],
)
def test_shards_are_of_a_size_that_suits_the_model(
    changes: dict[str, Any], prepares: bool, rows: int
) -> None:
    assert parse_spec(job(**changes)).shard_rows(prepares=prepares) == rows


def test_the_repository_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPOSITORY_VARIABLE, "/srv/models")
    assert parse_spec(job()).repository_path() == Path("/srv/models")
    assert parse_spec(job(repository="/other")).repository_path() == Path("/other")
    monkeypatch.delenv(REPOSITORY_VARIABLE)
    with pytest.raises(ConfigInvalid, match="repository: not given, and RAYPRISM_REPOSITORY"):
        parse_spec(job()).repository_path()


# --- what is wrong with it


def test_every_fault_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
model: fl/ights
version: 1.5
extra: 1
input:
  uri: [a, 3]
  format: parquett
  columns: {x: [], y: no}
output:
  passthrough: [a, a]
pool: {min_actors: 3, max_actors: 2, cpus: 1e1}
limits: {batch_rows: "64", shard_row: 5}
"""
    with pytest.raises(ConfigInvalid) as caught:
        load_spec(write(tmp_path, text))
    assert {(fault.path, fault.line) for fault in caught.value.faults} == {
        ("model", 1),
        ("version", 2),
        ("extra", 3),
        ("input.uri", 5),
        ("input.format", 6),
        ("input.columns.y", 7),
        ("output.uri", 8),
        ("output.passthrough", 9),
        ("pool.max_actors", 10),
        ("pool.cpus", 10),
        ("limits.batch_rows", 11),
        ("limits.shard_row", 11),
    }
    assert str(tmp_path / "job.yaml") in str(caught.value)
    assert "12 faults" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"version": 0}, "version", "greater than or equal to 1"),
        ({"version": True}, "version", 'a whole number from 1, as in "3"'),
        ({"version": "two"}, "version", "valid integer"),
        ({"model": "../x"}, "model", "a model name has letters"),
        ({"repository": "models"}, "repository", "an absolute path"),
        ({"device": "gpu"}, "device", "'auto', 'cpu' or 'cuda'"),
        ({"allow_code": "yes"}, "allow_code", "valid boolean"),
        ({"input": "data"}, "input", "a mapping; got 'data'"),
        ({"input__uri": []}, "input.uri", "at least one file"),
        ({"input__uri": ["a", "a"]}, "input.uri", "'a' is given twice"),
        ({"input__uri": ""}, "input.uri", "empty string"),
        ({"input__columns": {"x": []}}, "input.columns", "'x' has no column"),
        ({"input__columns": {"x": ["a", "a"]}}, "input.columns.x", "'a' is given twice"),
        ({"input__csv": {"delimiter": "\\t"}}, "input.csv.delimiter", "in double quotes"),
        ({"input__csv": {"delimiter": '"'}}, "input.csv.delimiter", "one ASCII character"),
        (
            {"input__format": "parquet", "input__csv": {"delimiter": ";"}},
            "input.csv",
            "only for format: csv",
        ),
        ({"input__format": "images"}, "input.images", "images: {size: [224, 224]}"),
        (
            {"input__format": "csv", "input__images": {"size": [8, 8]}},
            "input.images",
            "only for format: images; the format is csv",
        ),
        ({"input__images": {"size": [8]}}, "input.images.size[1]", "missing, and has no default"),
        ({"input__images": {"size": [8, 0]}}, "input.images.size[1]", "greater than or equal"),
        ({"output__passthrough": ["*", "a"]}, "output.passthrough", "give it alone"),
        ({"output__partitioned": True}, "output", "needs input.partitioning: hive"),
        ({"output__compression": "lzma"}, "output.compression", "'zstd', 'snappy'"),
        ({"output": {}}, "output.uri", "missing, and has no default"),
        ({"pool__min_actors": 3}, "pool.max_actors", "at least min_actors, which is 3; got 2"),
        ({"pool__initial_actors": 9}, "pool.initial_actors", "which are 1 and 2; got 9"),
        ({"pool__gpus": 1.5}, "pool.gpus", "Ray cannot split several GPUs"),
        ({"pool__cpus": 0}, "pool.cpus", "greater than 0"),
        ({"limits__shard_rows": 0}, "limits.shard_rows", "greater than or equal to 1"),
        ({"limits__shard_rows": 1e6}, "limits.shard_rows", "valid integer"),
        ({"mode": "streaming"}, "mode", "'auto', 'stream' or 'pipeline'; got 'streaming'"),
        ({"verison": 2}, "verison", "unknown key. Did you mean 'version'? Allowed: model"),
        ({"pool__max_actor": 2}, "pool.max_actor", "Did you mean 'max_actors'? Allowed: min"),
        ({"input__csv": {"quote": "x"}}, "input.csv.quote", "Allowed: delimiter, newlines"),
        ({"input__images": {"sizes": 1}}, "input.images.sizes", "Did you mean 'size'?"),
    ],
)
def test_a_fault_says_what_is_allowed(changes: dict[str, Any], path: str, message: str) -> None:
    assert message in faults(**changes)[path]


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("limits: {max_dead_letters: 1e3}", "limits.max_dead_letters", "a sign: write it out"),
        ("pool: {gpus: 1e-1}", "pool.gpus", "a point and a sign: 1.0e-1"),
        ("pool: {gpus: 2.5e1}", "pool.gpus", "a point and a sign: 2.5e+1"),
        ("device: no", "device", "got False"),
        ("repository: on", "repository", "YAML reads yes, no, on and off as booleans: quote it"),
        ("repository: 2024-01-01", "repository", "valid string"),
        ("no: 1", "no", "the key no is not a string. Quote it"),
        ("pool: {1: 2}", "pool.1", "the key 1 is not a string"),
        ("device: cpu\ndevice: cuda", "device", "given twice, first in line 5"),
    ],
)
def test_what_yaml_reads_as_something_else(
    tmp_path: Path, text: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_spec(write(tmp_path, SMALLEST + text))
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message
    assert fault.line == (6 if "twice" in message else 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- model: flights", "allowed is a mapping with model, version, input and output"),
        ("model: {", "not YAML"),
        ("model:\n\tversion: 2", "Indent with spaces, not tabs"),
        ("a: 1\n---\nb: 2", "a second document starts here"),
        ("a: &a [*a]", "An alias that holds itself?"),
        ("a: !!python/object:os.system {}", "not YAML"),
        ("a: 2024-13-45", "not YAML: month must be in 1..12"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_spec(write(tmp_path, text))
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot be read: No such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(ConfigInvalid, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(ConfigInvalid, match="not UTF-8"):
        load_spec(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("source", "output", "allowed"),
    [
        ("data", "data", False),
        ("data", "data/out", False),
        ("data/", "./data/../data/out", False),
        ("s3://bucket/data", "s3://bucket/data/out/", False),
        ("file:///data", "/data/out", False),
        (".", "out", False),
        ("data/**/*.parquet", "data/out", False),
        ("**/*.parquet", "out", False),
        ("/**/*.parquet", "/out", False),
        ("data", "data-out", True),
        ("data", "out", True),
        ("data/in", "data", True),
        ("data/*.parquet", "data/out", True),
        ("data/in/**/*.csv", "data/out", True),
        (".", "/out", True),
        (".", "../out", True),
        (".", "s3://bucket/out", True),
    ],
)
def test_a_job_does_not_read_what_it_writes(source: str, output: str, allowed: bool) -> None:
    if allowed:
        assert parse_spec(job(input__uri=source, output__uri=output))
    else:
        found = faults(input__uri=["elsewhere", source], output__uri=output)
        assert f"uri: {output} lies in the input {source}" in found["output"]


# --- from the command line


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST + "pool: {max_actors: 3}")
    spec = load_spec(
        file, ["pool.max_actors=7", "input.columns.hour=dep_hour", "limits.batch_rows=64"]
    )
    assert spec.pool.max_actors == 7
    assert spec.input.columns == {"hour": ("dep_hour",)}
    assert spec.limits.batch_rows == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pool.max_actors", "got no path and value, as in pool.max_actors=4"),
        ("=4", "got no path and value"),
        ("pool..cpus=4", "got no path and value"),
        ("pool.cpus={", "not YAML"),
        ("model.name=x", "model is not a mapping in the file"),
        ("pool.max_actors=many", "pool.max_actors: Input should be a valid integer; got 'many'"),
        ("pool.actors=3", "pool.actors: unknown key. Did you mean"),
    ],
)
def test_faults_of_the_command_line(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_spec(write(tmp_path, SMALLEST), [change])
    assert message in str(caught.value)


# --- what a resumed job is compared by


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": {"max_actors": 9, "gpus": 1}},
        {"mode": "pipeline"},
        {"limits": {"max_dead_letters": 5, "batch_rows": 3, "max_memory_bytes": 10**9}},
        {"repository": "/elsewhere"},
        {"allow_code": True},
        {"options": {}},
    ],
)
def test_what_may_change_between_runs(changes: dict[str, Any]) -> None:
    assert parse_spec(job(**changes)).identity(prepares=False) == parse_spec(job()).identity(
        prepares=False
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3},
        {"model": "other"},
        {"device": "cpu"},
        {"options": {"onnx": {"fp16": True}}},
        {"input__uri": "other"},
        {"input__columns": {"a": "b"}},
        {"output__prefix": "p_"},
        {"output__passthrough": ["a"]},
        {"output__compression": "none"},
        {"limits__shard_rows": 10},
        {"input__images": {"size": [8, 8]}},
        {"limits__shard_bytes": 10_000},
    ],
)
def test_what_may_not_change_between_runs(changes: dict[str, Any]) -> None:
    assert parse_spec(job(**changes)).identity(prepares=False) != parse_spec(job()).identity(
        prepares=False
    )


def test_a_default_counts_as_its_number() -> None:
    """Else a release with another default would take over an output that it cuts differently."""
    default = parse_spec(job())
    for prepares, rows in ((False, 262_144), (True, 2_048)):
        said = parse_spec(job(limits__shard_rows=rows))
        assert default.identity(prepares=prepares) == said.identity(prepares=prepares)
    assert default.identity(prepares=True) != default.identity(prepares=False)


def test_one_meaning_has_one_identity() -> None:
    one = parse_spec(job(version=2, input__uri="a", input__columns={"x": "y"}))
    other = parse_spec(job(version="2", input__uri=["a"], input__columns={"x": ["y"]}))
    assert one.identity(prepares=False) == other.identity(prepares=False)
