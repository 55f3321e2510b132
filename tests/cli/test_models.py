"""`rayprism models`, with a small real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rayprism.cli.main import cli
from rayprism.models.repository import Repository
from tests.support.models import mlp_example, save_mlp


class Desk:
    """A folder with a model and an example, and the command."""

    def __init__(self, folder: Path) -> None:
        self.model = save_mlp(folder / "model.onnx")
        self.example = folder / "rows.json"
        self.example.write_text(json.dumps(mlp_example()))
        self.repository = folder / "models"

    def models(self, command: str, *arguments: str) -> Result:
        options = ["--repository", str(self.repository)]
        return CliRunner().invoke(cli, ["models", command, *options, *arguments])

    def push(self, *options: str) -> Result:
        return self.models("push", "mlp", str(self.model), "--example", str(self.example), *options)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_push_tells_the_version_its_signature_and_how_to_serve_it(desk, tmp_path):
    result = desk.push("--metadata", "auc=0.81", "--metadata", "by=me", "--max-rows", "16")
    assert result.exit_code == 0, result.stderr
    assert "mlp version 1 is in " in result.stdout
    assert "input    x FP32 [-1, 4]" in result.stdout
    assert "output   y FP32 [-1, 3]" in result.stdout
    manifest = Repository(desk.repository).version("mlp", 1).manifest
    assert manifest.metadata["auc"] == 0.81
    assert manifest.metadata["by"] == "me"
    assert manifest.batching.max_rows == 16

    snippet = tmp_path / "serve.yaml"
    snippet.write_text(result.stdout.split("To serve it:\n\n")[1])
    from rayprism.fleet.check_models import ModelChecks
    from rayprism.fleet.document import load_document

    checks = ModelChecks(load_document(snippet), desk.repository, verify=True)
    checks.run()
    assert checks.faults == checks.warnings == []
    assert checks.args[0].version == 1


def test_push_options_reach_the_manifest(desk, tmp_path):
    training = tmp_path / "training.json"
    training.write_text('{"rows": 100, "auc": 0.5}')
    result = desk.push(
        *("--tolerance-rule", "close", "--tolerance-absolute", "0.5"),
        *("--metadata-file", str(training), "--metadata", "auc=0.9"),
        *("--max-delay-s", "0.01", "--execution", "inline"),
    )
    assert result.exit_code == 0, result.stderr
    manifest = Repository(desk.repository).version("mlp", 1).manifest
    assert manifest.golden.tolerance.absolute == 0.5
    assert (manifest.metadata["rows"], manifest.metadata["auc"]) == (100, 0.9)
    assert manifest.batching.max_delay_s == 0.01
    assert manifest.batching.execution == "inline"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--metadata", "auc"], "KEY=VALUE"),
        (["--metadata-file", "/no/such/file"], "/no/such/file"),
        (["--ragged", "x:1"], "NAME:AXIS:VALUE"),
        (["--ragged", "x:0:0"], "axis 0"),
        (["--input", "x:FP32"], "NAME:DATATYPE:SHAPE"),
        (["--input", "x:FLOAT:-1"], "no datatype"),
        (["--input", "x:FP32:a"], "invalid literal"),
        (["--input", "x:FP32:0"], "from 1"),
        (["--tolerance-absolute", "-1"], "0 or more"),
        (["--max-rows", "0"], "range"),
    ],
)
def test_wrong_options_are_wrong_usage(desk, options, word):
    result = desk.push(*options)
    assert result.exit_code == 2
    assert word in result.stderr


def test_a_push_that_fails_says_why_and_leaves_nothing(desk):
    result = desk.push("--max-cost", "5")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the options for batching: 1 fault")
    missing = desk.models("push", "mlp", "none.onnx", "--example", str(desk.example))
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: none.onnx does not exist")
    assert Repository(desk.repository).models() == []


def test_list_and_show(desk):
    assert "no models in" in desk.models("list").stdout
    desk.push()
    desk.push()
    table = desk.models("list").stdout.splitlines()
    assert table[0].split() == ["MODEL", "VERSIONS", "NEWEST", "CREATED", "RUNTIME"]
    assert table[1].split()[:3] == ["mlp", "1-2", "2"]
    assert table[1].split()[-1] == "onnx"
    (item,) = json.loads(desk.models("list", "--json").stdout)
    assert (item["model"], item["versions"]) == ("mlp", [1, 2])

    versions = desk.models("show", "mlp").stdout.splitlines()
    assert [line.split()[0] for line in versions] == ["VERSION", "1", "2"]
    assert len(json.loads(desk.models("show", "mlp", "--json").stdout)) == 2
    shown = desk.models("show", "mlp", "2").stdout
    assert "mlp version 2" in shown
    assert "digest   sha256:" in shown
    manifest = json.loads(desk.models("show", "mlp", "2", "--json").stdout)
    assert manifest["version"] == 2


def test_what_is_not_there_is_an_error(desk):
    desk.push()
    assert "has no model 'mpl'" in desk.models("show", "mpl").stderr
    assert "Did you mean 'mlp'?" in desk.models("verify", "mpl").stderr
    assert "It has: 1" in desk.models("show", "mlp", "7").stderr


def test_a_broken_manifest_does_not_hide_the_others(desk):
    desk.push()
    folder = desk.repository / "bad" / "1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    listed = json.loads(desk.models("list", "--json").stdout)
    assert [item["model"] for item in listed] == ["bad", "mlp"]
    assert "not JSON" in listed[0]["error"]


def test_verify(desk):
    desk.push()
    desk.push()
    result = desk.models("verify")
    assert (result.exit_code, result.stdout) == (0, "ok   mlp 1\nok   mlp 2\n")
    loaded = desk.models("verify", "mlp", "1", "--load")
    assert loaded.exit_code == 0
    assert "golden example reproduced" in loaded.stdout

    file = desk.repository / "mlp" / "2" / "model.onnx"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes() + b"x")
    result = desk.models("verify")
    assert result.exit_code == 1
    assert "ok   mlp 1" in result.stdout
    assert "bad  mlp 2: " in result.stdout
    assert "model.onnx" in result.stdout
