"""Copies versions from one repository to another, of which either may be in object storage.

A repository is served from a folder. Where machines share none, object storage hands it to them,
and keeps a copy. A version appears whole there too: its manifest, by which it is one, comes last.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from posixpath import dirname

import pyarrow as pa
from pyarrow import fs as pa_fs

from rayprism.errors import DigestMismatch, RepositoryError
from rayprism.models.manifest import MANIFEST_FILE, Manifest, is_model_name

__all__ = ["Copied", "Place", "copy_versions"]

_VERSION = re.compile(r"(?P<model>[^/]+)/(?P<version>[1-9][0-9]{0,9})/" + re.escape(MANIFEST_FILE))
_PART_SUFFIX = ".part"
_BLOCK_BYTES = 4 * 1024 * 1024

Place = tuple[pa_fs.FileSystem, str]
"""A filesystem, and a path in it."""


@dataclass(slots=True)
class Copied:
    """What was done, as `model/version`.

    Args:
        copied: Versions that the target did not have.
        present: Versions that it had already.
    """

    copied: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)


def copy_versions(
    source: Place, target: Place, *, say: Callable[[str], None] = lambda _: None
) -> Copied:
    """Copies every version that the target lacks. Nothing is changed or deleted there.

    Args:
        source: A repository.
        target: Another one; it need not exist.
        say: Is told of each version that was copied.

    Raises:
        RepositoryError: A file cannot be read or written, or the target has another version under
            the same number.
        DigestMismatch: A file is not what its manifest says. Its version is not copied.
        ConfigInvalid: A manifest has faults.
    """
    done = Copied()
    different: list[str] = []
    try:
        versions = _find_versions(source)
        target[0].create_dir(target[1], recursive=True)
        there = set(_find_versions(target))
        for name in versions:
            manifest = _read(source, f"{name}/{MANIFEST_FILE}")
            if name not in there:
                _copy_version(source, target, name, manifest)
                done.copied.append(name)
                say(f"copied {name}")
            elif _read(target, f"{name}/{MANIFEST_FILE}") == manifest:
                done.present.append(name)
            else:
                different.append(name)
    except OSError as error:
        raise RepositoryError(f"copying stopped: {_first_line(error)}") from error
    if different:
        raise RepositoryError(
            f"{', '.join(different)}: the target has others under these numbers, which stay as "
            "they are. Two repositories were pushed to; push to one, and copy it to the other"
        )
    return done


def _find_versions(place: Place) -> list[str]:
    """`model/version` of each, by name and number."""
    filesystem, root = place
    selector = pa_fs.FileSelector(root, recursive=True, allow_not_found=True)
    found = []
    for info in filesystem.get_file_info(selector):
        relative = info.path.removeprefix(root.rstrip("/") + "/")
        match = _VERSION.fullmatch(relative) if info.type == pa_fs.FileType.File else None
        if match and is_model_name(match["model"]):
            found.append((match["model"], int(match["version"])))
    return [f"{model}/{version}" for model, version in sorted(found)]


def _copy_version(source: Place, target: Place, name: str, text: bytes) -> None:
    manifest = Manifest.from_json(text, f"{source[1]}/{name}/{MANIFEST_FILE}")
    if f"{manifest.model}/{manifest.version}" != name:
        raise RepositoryError(
            f"{name} holds the manifest of {manifest.model!r} version {manifest.version}"
        )
    for relative, entry in manifest.files.items():
        path = f"{name}/{relative}"
        with source[0].open_input_stream(f"{source[1]}/{path}") as stream:
            digest = _write(target, path, _blocks(stream))
        if digest != entry.sha256:
            raise DigestMismatch(
                f"{source[1]}/{path} has sha256 {digest}, expected {entry.sha256}: {name} is not "
                "what was pushed, and was not copied"
            )
    _write(target, f"{name}/{MANIFEST_FILE}", [text])


def _blocks(stream: pa.NativeFile) -> Iterator[bytes]:
    while block := stream.read(_BLOCK_BYTES):
        yield block


def _read(place: Place, path: str) -> bytes:
    with place[0].open_input_stream(f"{place[1]}/{path}") as stream:
        return bytes(stream.read())


def _write(place: Place, path: str, blocks: Iterable[bytes]) -> str:
    """Writes a file; its digest."""
    filesystem, full = place[0], f"{place[1]}/{path}"
    # Object storage shows what is complete, and has no folders.
    local = isinstance(filesystem, pa_fs.LocalFileSystem)
    if local:
        filesystem.create_dir(dirname(full), recursive=True)
    digest = hashlib.sha256()
    with filesystem.open_output_stream(full + _PART_SUFFIX if local else full) as stream:
        for block in blocks:
            digest.update(block)
            stream.write(block)
    if local:
        filesystem.move(full + _PART_SUFFIX, full)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
