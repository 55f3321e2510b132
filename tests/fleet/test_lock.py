"""The lock of a fleet: one change at a time, also between processes, also after a kill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayprism.errors import ClusterError
from rayprism.fleet.lock import LOCK_FILE, lock_fleet, whoami

HOLD = """
import sys
from pathlib import Path
from rayprism.fleet.lock import lock_fleet
with lock_fleet(Path(sys.argv[1]), "promote flights 4"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_command_is_told_who_holds_it(tmp_path):
    with another_process(tmp_path) as process:
        with (
            pytest.raises(ClusterError) as raised,
            lock_fleet(tmp_path, "rollback flights"),
        ):
            pytest.fail("held by two")
        said = str(raised.value)
        assert f"{whoami()} (promote flights 4, since 20" in said
        assert f"pid {process.pid}" in said


def test_it_goes_when_its_holder_ends(tmp_path):
    with another_process(tmp_path) as process:
        process.communicate("")
        assert process.returncode == 0
        with lock_fleet(tmp_path, "rollback flights"):
            pass


def test_it_goes_when_its_holder_is_killed(tmp_path):
    with another_process(tmp_path) as process:
        process.kill()
        process.wait()
        with lock_fleet(tmp_path, "rollback flights"):
            pass
    with lock_fleet(tmp_path, "traffic flights"):
        pass


def test_it_goes_when_the_change_fails(tmp_path):
    with pytest.raises(ValueError, match="in it"), lock_fleet(tmp_path, "promote flights 4"):
        raise ValueError("in it")
    # Nobody is taken for its holder now.
    assert (tmp_path / LOCK_FILE).read_text() == ""
    with lock_fleet(tmp_path, "promote flights 4"):
        pass


def test_a_holder_that_has_not_said_who_it_is_yet(tmp_path):
    with lock_fleet(tmp_path, "promote flights 4"):
        (tmp_path / LOCK_FILE).write_text("")
        with pytest.raises(ClusterError, match="somebody else"), lock_fleet(tmp_path, "again"):
            pytest.fail("held by two")


def test_a_repository_that_is_not_there(tmp_path):
    with (
        pytest.raises(ClusterError, match=r"cannot be written.*--repository"),
        lock_fleet(tmp_path / "none", "promote flights 4"),
    ):
        pytest.fail("held without a repository")
