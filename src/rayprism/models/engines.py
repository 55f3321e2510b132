"""Where TensorRT's engines of a version are kept: built once for each kind of GPU, then read.

A version's own folder never changes, so they lie beside it, in RAYPRISM_CACHE (by default
`~/.cache/rayprism`). What reads an engine runs code that is in it: the folder has to be one that
only its owner can write.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayprism.errors import LoadFailed
from rayprism.models.gpu import GpuFacts
from rayprism.models.manifest import Manifest

__all__ = ["CACHE_VARIABLE", "building", "engine_folder"]

CACHE_VARIABLE = "RAYPRISM_CACHE"
"""Environment variable that names the folder of what was made for this machine."""

_DIGEST_DIGITS = 16


def engine_folder(manifest: Manifest, gpu: GpuFacts) -> Path:
    """The folder of a version's engines for one kind of GPU; it is made where it is not there.

    TensorRT's and ONNX Runtime's own releases are in the names of the files.

    Raises:
        LoadFailed: It cannot be made, or others can write it.
    """
    root = os.environ.get(CACHE_VARIABLE)
    cache = Path(root) if root else _user_cache() / "rayprism"
    digest = manifest.digest.removeprefix("sha256:")[:_DIGEST_DIGITS]
    version = f"{manifest.model}-{manifest.version}-{digest}"
    folder = cache
    for name in ("engines", version, re.sub(r"[^A-Za-z0-9.]+", "-", gpu.name)):
        folder /= name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise LoadFailed(
                f"the folder for TensorRT's engines cannot be made ({error}). Set {CACHE_VARIABLE} "
                "to a folder that can be written"
            ) from None
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise LoadFailed(
                f"{folder}: others can write there, and who reads one of TensorRT's engines runs "
                f"what is in it. Mend: chmod go-w, chown, or set {CACHE_VARIABLE}"
            )
    return folder


def _user_cache() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME")
    return Path(configured) if configured else Path.home() / ".cache"


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """One process at a time: the others wait, and read what it built."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
