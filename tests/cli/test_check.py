"""`rayprism check`: what it prints and with what it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RAYPRISM = str(Path(sys.executable).parent / "rayprism")
GOOD = """\
http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}
applications:
- name: theirs
  route_prefix: /theirs
  import_path: "their.module:app"
"""


def rayprism(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: Ray, which is imported for its schema, warns of itself.
    return subprocess.run([RAYPRISM, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.e2e
def test_good_and_bad_files(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(GOOD)
    bad.write_text(GOOD.replace("host: 127.0.0.1", "prot: 1").replace("route_prefix", "route"))
    done = rayprism("check", str(good))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{good}: OK, 1 application",
        "  APPLICATION  ROUTE    MODEL  VERSION  REPLICAS  DIGEST",
        "  theirs       /theirs  -      -        default   -",
    ]
    done = rayprism("check", str(good), str(bad))
    assert done.returncode == 1
    assert f"{bad}:1: fault: http_options.prot: unknown key" in done.stdout
    assert f"{bad}:4: fault: applications[0].route: unknown key" in done.stdout
    assert f"{bad}:1: warning: http_options.host: not given" in done.stdout
    assert f"{bad}: 2 faults, 1 warning" in done.stdout


@pytest.mark.e2e
def test_json(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    done = rayprism("check", "--json", str(path))
    assert done.returncode == 1
    (report,) = json.loads(done.stdout)
    assert report["ok"] is False
    assert report["file"] == str(path)
    assert report["faults"] == [
        {"path": "", "message": "the file is empty. It needs `applications:`", "line": 1}
    ]
