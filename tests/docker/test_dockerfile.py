"""The Dockerfile, as far as it can be checked without a build (docker/build_local.sh)."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker" / "Dockerfile").read_text()
STAGES = {
    name: body
    for body in re.split(r"^(?=FROM )", TEXT, flags=re.M)[1:]
    for name in re.findall(r"^FROM \S+ AS (\S+)", body)
}


def test_what_is_copied_reaches_the_build():
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)", TEXT, re.M)
        for source in line.split()[:-1]
    ]
    assert "src" in copied
    for source in copied:
        assert any(fnmatch(source.removeprefix("./"), pattern) for pattern in allowed), source
        assert list(ROOT.glob(source)), source


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_images_hold_what_was_built_elsewhere_and_run_as_nobody_special(target):
    assert STAGES[target].startswith("FROM node AS")
    assert "RUN" not in STAGES[target]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", STAGES["node"], re.M)
    assert "USER" not in STAGES[target]
    for instruction in ("HEALTHCHECK", "ENTRYPOINT", "VOLUME /tmp"):
        assert instruction in STAGES["node"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_extras_are_there_and_have_one_onnxruntime(target):
    extras = re.search(r"^ARG EXTRAS=(\S+)", STAGES[f"packages-{target}"], re.M)[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= project["optional-dependencies"].keys()
    assert len({"cpu", "gpu"} & set(extras)) == 1


def test_everything_that_is_fetched_is_pinned():
    base = re.search(r"^ARG BASE=(\S+)", TEXT, re.M)[1]
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
    for line in (ROOT / "docker" / "constraints-gpu.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==\S+", line), line
    both = (ROOT / "docker" / "constraints-gpu.txt", ROOT / "constraints.txt")
    names = [
        re.findall(r"^([\w.-]+)==", path.read_text().lower().replace("_", "-"), re.M)
        for path in both
    ]
    assert not set(names[0]) & set(names[1])
