"""Opens filesystems, and finds what paths, folders and globs name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from posixpath import commonpath, dirname
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pa_fs

from rayprism.core.tensors import suggest
from rayprism.errors import ConfigInvalid, Fault, SetupError

__all__ = [
    "find_files",
    "is_compressed",
    "name_of",
    "open_filesystem",
    "open_text",
    "raise_faults",
    "read_head",
    "reading",
    "what_failed",
]

_MOST_NAMED = 20
_QUERY = re.compile(r"\?(?=[A-Za-z_]+=)")
_GLOB = re.compile(r"[*?\[]")
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


def open_filesystem(uri: str) -> tuple[pa_fs.FileSystem, str]:
    """Opens the filesystem of a path or URI.

    Args:
        uri: A local path, or anything that pyarrow opens (`file://`, `s3://`, `gs://`, `hdfs://`,
            `abfs://`), with its options (`s3://bucket/key?endpoint_override=...`).

    Returns:
        The filesystem, and the path in it; nothing need be there.

    Raises:
        SetupError: No such filesystem, or it cannot be reached.
    """
    filesystem, path = _split(uri)
    return _filesystem(filesystem)[0], path


def _split(uri: str) -> tuple[str, str]:
    """The URI that opens the filesystem alone, and the path in it."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return "file:///", Path(uri).expanduser().absolute().as_posix()
    rest, *options = _QUERY.split(rest, maxsplit=1)
    if scheme == "file":
        return "file:///", "/" + unquote(rest).strip("/")
    host, _, path = rest.partition("/")
    filesystem = f"{scheme}://{host}/" + (f"?{options[0]}" if options else "")
    base = _filesystem(filesystem)[1].rstrip("/")
    return filesystem, f"{base}/{unquote(path)}".rstrip("/")


@lru_cache(maxsize=16)
def _filesystem(uri: str) -> tuple[pa_fs.FileSystem, str]:
    try:
        filesystem, path = pa_fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise SetupError(
            f"{uri} cannot be opened: {what_failed(error)}. Allowed is a path, or a URI of a "
            "filesystem that pyarrow opens: file, s3, gs, hdfs, abfs"
        ) from error
    return filesystem, str(path)


def is_compressed(path: str) -> bool:
    """Whether a text file has to be read from its start."""
    return path.lower().endswith(_COMPRESSED)


def open_text(filesystem: pa_fs.FileSystem, path: str) -> Any:
    """Opens a text file for reading; what is compressed is unpacked, and cannot seek."""
    if is_compressed(path):
        return filesystem.open_input_stream(path, compression="detect")
    return filesystem.open_input_file(path)


def read_head(filesystem: pa_fs.FileSystem, path: str, size_bytes: int) -> bytes:
    """The first bytes of a text file, or all of it where it has no more."""
    with open_text(filesystem, path) as file:
        head = b""
        while len(head) < size_bytes and (chunk := file.read(size_bytes - len(head))):
            head += chunk
        return head


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Names the file that could not be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise SetupError(f"{path} cannot be read: {what_failed(error)}") from error


def what_failed(error: Exception) -> str:
    """The first line of what a library says; the rest is its inside."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def name_of(uris: Sequence[str]) -> str:
    """What to call an input in a message."""
    return uris[0] if len(uris) == 1 else f"{uris[0]} and {len(uris) - 1} more"


def raise_faults(uris: Sequence[str], faults: Sequence[Fault]) -> None:
    """Raises ConfigInvalid for faults of files, where there are any; at most 20 are named."""
    if len(faults) > _MOST_NAMED:
        rest = len(faults) - _MOST_NAMED
        faults = [*faults[:_MOST_NAMED], Fault(f"{rest} more", "not shown")]
    if faults:
        raise ConfigInvalid(name_of(uris), faults)


def find_files(uris: Sequence[str], *, partitioned: bool) -> tuple[str, str, dict[str, int]]:
    """Finds what paths, folders and globs name.

    Names that begin with `.` or `_` are passed over, but for folders `_name=value`, and for a file
    that is named itself. A file that is named twice counts once.

    Args:
        uris: All on one filesystem.
        partitioned: Whether folders `name=value` mean something: the root is then above them.

    Returns:
        The URI of the filesystem, the root folder, and the size in bytes of each file by its path
        from the root, in order.

    Raises:
        SetupError: Nothing is there, or a folder cannot be read.
        ConfigInvalid: Something that was found is not a file; each is named.
    """
    if not uris:
        raise SetupError("the input names no file, folder or glob")
    places = [_split(uri) for uri in uris]
    filesystems = sorted({filesystem for filesystem, _ in places})
    if len(filesystems) > 1:
        raise SetupError(
            f"one input must lie on one filesystem; got {', '.join(filesystems)}. Mend: run one "
            "job for each"
        )
    filesystem = _filesystem(filesystems[0])[0]
    found: dict[str, int] = {}
    bases: list[str] = []
    faults: list[Fault] = []
    for uri, (_, path) in zip(uris, places, strict=True):
        base, infos = _expand(filesystem, uri, path)
        files = [info for info in infos if info.type == pa_fs.FileType.File]
        odd = [info for info in infos if info.type != pa_fs.FileType.File]
        if not infos:
            raise SetupError(f"{uri} matches no file{_nearby(filesystem, base)}")
        bases.append(base)
        found.update((info.path, info.size) for info in files)
        faults += [Fault(info.path, "neither a file nor a folder") for info in odd]
    raise_faults(uris, faults)
    root = commonpath(bases) if len(bases) > 1 else bases[0]
    while partitioned and "=" in root.rpartition("/")[2]:
        root = dirname(root)
    skip = len(root.rstrip("/")) + 1
    return filesystems[0], root, {path[skip:]: found[path] for path in sorted(found)}


def _expand(filesystem: pa_fs.FileSystem, uri: str, path: str) -> tuple[str, list[pa_fs.FileInfo]]:
    """The folder that a path or glob starts from, and what it names."""
    with reading(uri):
        info = filesystem.get_file_info(path)
        if info.type == pa_fs.FileType.File:
            return dirname(path), [info]
        if info.type == pa_fs.FileType.Directory:
            return path, _walk(filesystem, path, recursive=True)
        parts = path.split("/")
        fixed = next((at for at, part in enumerate(parts) if _GLOB.search(part)), None)
        if fixed is None:
            raise SetupError(f"{uri} does not exist{_nearby(filesystem, dirname(path), parts[-1])}")
        base, pattern = "/".join(parts[:fixed]) or "/", parts[fixed:]
        if filesystem.get_file_info(base).type != pa_fs.FileType.Directory:
            raise SetupError(f"{uri} matches no file: {base} is not a folder")
        return base, _glob(filesystem, base, pattern)


def _glob(filesystem: pa_fs.FileSystem, base: str, pattern: list[str]) -> list[pa_fs.FileInfo]:
    # One listing of everything is cheaper than one for each folder, but for a single level.
    deep = len(pattern) > 1 or pattern == ["**"]
    skip = len(base.rstrip("/")) + 1
    found: list[pa_fs.FileInfo] = []
    for info in _walk(filesystem, base, recursive=deep, folders=not deep):
        if not _matches(info.path[skip:].split("/"), pattern):
            continue
        if info.type == pa_fs.FileType.Directory:
            found += _walk(filesystem, info.path, recursive=True)
        else:
            found.append(info)
    return found


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob names a path, or a folder that it lies in."""
    if not pattern:
        return True
    if pattern[0] == "**":
        rest = pattern[1:]
        return any(_matches(parts[at:], rest) for at in range(len(parts)))
    if not parts or not fnmatchcase(parts[0], pattern[0]):
        return False
    return _matches(parts[1:], pattern[1:])


def _walk(
    filesystem: pa_fs.FileSystem, base: str, *, recursive: bool, folders: bool = False
) -> list[pa_fs.FileInfo]:
    infos = filesystem.get_file_info(pa_fs.FileSelector(base, recursive=recursive))
    skip = len(base.rstrip("/")) + 1
    return [
        info
        for info in infos
        if (folders or info.type != pa_fs.FileType.Directory)
        and not any(_is_hidden(part) for part in info.path[skip:].split("/"))
    ]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _nearby(filesystem: pa_fs.FileSystem, folder: str, name: str | None = None) -> str:
    try:
        names = [info.base_name for info in filesystem.get_file_info(pa_fs.FileSelector(folder))]
    except (OSError, pa.ArrowException):
        return f": there is no folder {folder}"
    if name is not None:
        return "." + suggest(name, names)
    shown = ", ".join(sorted(names)[:5]) or "nothing"
    return f": {folder} holds {shown}{', ...' if len(names) > 5 else ''}"
