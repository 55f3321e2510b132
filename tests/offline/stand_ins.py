"""Filesystems that are none: a folder in memory, as an object store or as one that renames."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.fs as pa_fs


class Killed(OSError):
    """The process is gone: nothing that it still tries has an effect."""


class _Upload(io.BytesIO):
    def __init__(self, folder: MemoryFolder, path: str) -> None:
        super().__init__()
        self.folder, self.path = folder, path

    def write(self, data: Any) -> int:
        # In the midst of a file is one moment, however many writes it takes.
        if self.tell() == 0:
            self.folder.step()
        self.folder.look()
        if self.folder.left_bytes is not None:
            self.folder.left_bytes -= len(data)
            if self.folder.left_bytes < 0:
                raise OSError(28, "No space left on device")
        size = super().write(data)
        if self.folder.renames:
            self.folder.files[self.path] = self.getvalue()
        return size

    def close(self) -> None:
        if not self.closed and not self.folder.dead:
            self.folder.step()
            self.folder.files[self.path] = self.getvalue()
        super().close()


class MemoryFolder(pa_fs.FileSystemHandler):
    """Stand-in for a filesystem.

    Args:
        renames: As HDFS, which does not rename onto a file, and shows files that are half written;
            else as an object store: no rename, and a file is there when it is closed.
        left_steps: Changes until the process is killed. None: it lives.
        left_bytes: Room.
    """

    def __init__(self, renames: bool) -> None:
        self.renames = renames
        self.files: dict[str, bytes] = {}
        self.left_steps: int | None = None
        self.left_bytes: int | None = None
        self.dead = False
        self.moves = 0

    def step(self) -> None:
        if self.left_steps is not None:
            self.left_steps -= 1
            self.dead = self.left_steps < 0
        self.look()

    def look(self) -> None:
        if self.dead:
            raise Killed("killed")

    def revive(self) -> None:
        self.left_steps, self.dead = None, False

    def get_type_name(self) -> str:
        return "hdfs" if self.renames else "gcs"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def normalize_path(self, path: str) -> str:
        return path

    def _info(self, path: str) -> pa_fs.FileInfo:
        if path in self.files:
            return pa_fs.FileInfo(path, pa_fs.FileType.File, size=len(self.files[path]))
        inside = any(name.startswith(path + "/") for name in self.files)
        return pa_fs.FileInfo(path, pa_fs.FileType.Directory if inside else pa_fs.FileType.NotFound)

    def get_file_info(self, paths: list[str]) -> list[pa_fs.FileInfo]:
        self.look()
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: pa_fs.FileSelector) -> list[pa_fs.FileInfo]:
        self.look()
        base = selector.base_dir + "/"
        found = set()
        for name in self.files:
            if name.startswith(base):
                parts = name.removeprefix(base).split("/")
                depth = len(parts) if selector.recursive else 1
                found |= {base + "/".join(parts[:n]) for n in range(1, depth + 1)}
        return [self._info(path) for path in sorted(found)]

    def create_dir(self, path: str, recursive: bool) -> None:
        self.look()
        assert self.renames, "object stores have no folders"

    def delete_dir(self, path: str) -> None:
        for name in [name for name in self.files if name.startswith(path + "/")]:
            self.step()
            del self.files[name]

    def delete_file(self, path: str) -> None:
        self.step()
        if path not in self.files:
            raise FileNotFoundError(path)
        del self.files[path]

    def move(self, source: str, target: str) -> None:
        self.step()
        assert self.renames, "object stores do not rename"
        if target in self.files:
            raise OSError(f"{target} is there")
        self.moves += 1
        self.files[target] = self.files.pop(source)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self.look()
        if path not in self.files:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(self.files[path]), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        self.step()
        if self.renames:
            self.files[path] = b""
        return pa.PythonFile(_Upload(self, path), mode="w")

    def copy_file(self, source: str, target: str) -> None:
        raise NotImplementedError

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError
