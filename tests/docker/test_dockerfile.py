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
    assert "PIP_CONSTRAINT=/build/constraints.txt" in STAGES["builder"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    # What CUDA is made of is in nobody's environment here, so only the image would miss it.
    for name in ("onnxruntime-gpu", "nvidia-cublas", "nvidia-cudnn-cu13", "cuda-toolkit", "triton"):
        assert name in pinned
    assert len(set(pinned)) == len(pinned)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_packages_come_as_wheels(target):
    assert "install --only-binary :all:" in STAGES[f"packages-{target}"]


def test_pods_fit_the_image():
    """What Kubernetes is told of the image is what the Dockerfile makes."""
    base = ROOT / "docker" / "kubernetes" / "base"
    user = re.search(r"^USER (\d+):(\d+)$", TEXT, re.M)
    for name in ("rayservice.yaml", "toolbox.yaml"):
        text = (base / name).read_text()
        assert set(re.findall(r"runAsUser: (\d+)", text)) == {user[1]}
        assert set(re.findall(r"runAsGroup: (\d+)", text)) == {user[2]}
        assert "mountPath: /tmp}" in text
    environment = (base / "environment.env").read_text().splitlines()
    for name, value in (("HOME", "/tmp"), ("RAYPRISM_REPOSITORY", "/models")):
        assert f"{name}={value}" in environment
        assert f"{name}={value}" in re.split(r"[\s\\]+", STAGES["node"])
    run = (base.parent / "batch" / "rayjob.yaml").read_text()
    script = re.search(r"entrypoint: python (\S+)", run)[1]
    assert (ROOT / script).exists()
    # Ray runs it in the folder that the image starts in.
    assert "WORKDIR /srv\n" in STAGES["node"]
    assert "COPY batch/*.py /srv/batch/\n" in STAGES["node"]
