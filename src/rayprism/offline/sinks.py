"""Files of an output folder, which appear whole or not at all.

Where the filesystem renames, a file is written under a name of its own and renamed when it is
done. Object stores have no rename, and would turn what an exception left behind into an object:
there the file is written on this machine and uploaded when it is done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import pyarrow.fs as pa_fs

from rayprism.errors import SetupError

__all__ = ["TMP_FOLDER", "OutputFull", "Sink", "Store", "writes_by_rename"]

TMP_FOLDER = "_tmp"

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "r2"}
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OutputFull(SetupError):
    """There is no space left where the output goes. What is committed stays."""

    code = "output_full"


def writes_by_rename(fs: Any) -> bool:
    """Whether a file is renamed into place: not on object stores.

    Others are trusted to rename. One that copies instead, as fsspec's object stores do, is slower
    and as safe.
    """
    words = re.findall(r"[a-z0-9]+", fs.type_name.lower())
    return _OBJECT_STORES.isdisjoint(words)


class Store:
    """A folder on a filesystem. Names in it are relative, with `/`.

    Args:
        fs: A pyarrow filesystem.
        path: Of the folder.
        renames: Whether files are renamed into place; by default what suits the filesystem.
    """

    def __init__(self, fs: Any, path: str, renames: bool | None = None) -> None:
        while isinstance(fs, pa_fs.SubTreeFileSystem):
            path = f"{fs.base_path.rstrip('/')}/{path.lstrip('/')}"
            fs = fs.base_fs
        self.fs = fs
        self.path = path.rstrip("/") or "/"
        self.renames = writes_by_rename(fs) if renames is None else renames
        self.local = fs.type_name == "local"

    def at(self, name: str) -> str:
        """The path of a file or folder."""
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is no such file."""
        try:
            with self.fs.open_input_stream(self.at(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            # Some filesystems have no error of their own for a file that is not there.
            if not self.exists(name):
                return None
            raise SetupError(f"{self.at(name)} cannot be read: {error}") from error

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self.fs.get_file_info(self.at(name)).type == pa_fs.FileType.File)

    def listing(self, folder: str = "", *, recursive: bool = False) -> dict[str, int | None]:
        """Files with their sizes in bytes, and folders with None, by name relative to `folder`.

        Raises:
            SetupError: It cannot be listed, or is no folder.
        """
        base = self.at(folder)
        selector = pa_fs.FileSelector(base, allow_not_found=True, recursive=recursive)
        try:
            found = self.fs.get_file_info(selector)
        except OSError as error:
            raise SetupError(f"{base} cannot be listed: {error}") from error
        # Object stores list paths without the slash in front.
        skip = len(base.strip("/")) + 1
        return {
            info.path.lstrip("/")[skip if base != "/" else 0 :]: (
                None if info.type == pa_fs.FileType.Directory else info.size
            )
            for info in found
        }

    def open(self, name: str) -> Sink:
        """A file to be written, of which nothing is seen before it is published."""
        return Sink(self, name)

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file at once, over one that is there.

        Raises:
            OutputFull: No space.
            SetupError: It cannot be written.
        """
        sink = self.open(name)
        try:
            sink.write(data)
            sink.publish()
        finally:
            sink.discard()

    def delete(self, name: str) -> None:
        """Removes a file, where there is one."""
        try:
            self.fs.delete_file(self.at(name))
        except OSError as error:
            if self.exists(name):
                raise SetupError(f"{self.at(name)} cannot be deleted: {error}") from error

    def delete_folder(self, name: str) -> None:
        """Removes a folder with all that is in it, where there is one."""
        if self.fs.get_file_info(self.at(name)).type != pa_fs.FileType.Directory:
            return
        try:
            self.fs.delete_dir(self.at(name))
        except OSError as error:
            # Somebody who was still writing into it has gone on a little: theirs to clean up.
            if not self.listing(name):
                return
            raise SetupError(f"{self.at(name)} cannot be deleted: {error}") from error

    def make_folder_of(self, name: str) -> None:
        """Makes the folder in which a file will lie. Object stores have none."""
        if self.renames:
            self.fs.create_dir(self.at(name).rpartition("/")[0] or "/", recursive=True)

    def sync(self, name: str) -> None:
        """Has a local file or folder survive a loss of power; others look after themselves."""
        if not self.local:
            return
        handle = os.open(self.at(name), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def writing(self, name: str, spool: bool = False) -> Iterator[None]:
        """Says of errors what could not be written, and how to mend it.

        Args:
            name: Of the file.
            spool: Whether it is written on this machine first.
        """
        try:
            yield
        except OSError as error:
            where = f"{self.at(name)} (in {tempfile.gettempdir()})" if spool else self.at(name)
            if error.errno in _FULL:
                raise OutputFull(
                    f"no space left for {where}. Nothing half-written was left, and what is "
                    "committed stays. Make room and run the same again"
                ) from error
            raise SetupError(f"{where} cannot be written: {error}") from error


class Sink(io.RawIOBase):
    """A file that is being written.

    Args:
        store: Where it goes.
        name: What it will be called.
    """

    def __init__(self, store: Store, name: str) -> None:
        super().__init__()
        self._store = store
        self._name = name
        self._hash = hashlib.sha256()
        self._size = 0
        self._open = True
        base = name.rpartition("/")[2]
        self._tmp = f"{TMP_FOLDER}/{base}-{secrets.token_hex(8)}"
        self._stream: IO[bytes] | Any
        with store.writing(name, spool=not store.renames):
            if store.renames:
                store.make_folder_of(self._tmp)
                self._stream = store.fs.open_output_stream(store.at(self._tmp))
            else:
                # Without a name: it goes with the process, however that ends.
                self._stream = tempfile.TemporaryFile()  # noqa: SIM115

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    @property
    def sha256(self) -> str:
        """Of what was written so far: 64 hexadecimal digits."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        """For who writes into it."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def write(self, data: Any) -> int:
        """Adds bytes. What comes after `discard` goes nowhere: a Parquet writer ends in a footer.

        Raises:
            OutputFull: No space.
            SetupError: It cannot be written.
        """
        view = memoryview(data).cast("B")
        if self._open:
            with self._store.writing(self._name, spool=not self._store.renames):
                self._stream.write(view)
            self._hash.update(view)
        self._size += len(view)
        return len(view)

    def publish(self) -> None:
        """Puts the file where it belongs, over one that is there: from now on it is seen, whole.

        Raises:
            OutputFull: No space.
            SetupError: It cannot be written.
        """
        store = self._store
        with store.writing(self._name):
            if store.renames:
                self._stream.close()
                store.sync(self._tmp)
                store.make_folder_of(self._name)
                self._rename()
                store.sync(self._name.rpartition("/")[0])
            else:
                self._upload()
                self._stream.close()
        self._open = False

    def discard(self) -> None:
        """Leaves nothing behind. Does nothing where it was published."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(OSError):
            self._stream.close()
        if self._store.renames:
            with contextlib.suppress(OSError):
                self._store.fs.delete_file(self._store.at(self._tmp))

    def _rename(self) -> None:
        source, target = self._store.at(self._tmp), self._store.at(self._name)
        try:
            self._store.fs.move(source, target)
        except OSError:
            # HDFS does not rename onto a file that is there, as that of an attempt that died.
            if not self._store.exists(self._name) or not self._store.fs.get_file_info(source).size:
                raise
            self._store.fs.delete_file(target)
            self._store.fs.move(source, target)

    def _upload(self) -> None:
        # What a broken connection may leave is what no entry speaks of: it is written again.
        self._stream.seek(0)
        with self._store.fs.open_output_stream(self._store.at(self._name)) as target:
            shutil.copyfileobj(self._stream, target, 1 << 20)
