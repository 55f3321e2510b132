"""A model repository: a folder `<root>/<model>/<version>/` of immutable versions.

A version is `manifest.json` and the files that it lists. It appears whole, by one rename, or not
at all; a number is given once, to one push, whoever pushes at the same time.

Source: POSIX rename(2): a folder cannot be renamed onto a folder that holds anything, so of two
pushes that want one number, one gets it and the other takes the next.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rayprism.core.tensors import suggest
from rayprism.errors import DigestMismatch, RepositoryError
from rayprism.models.manifest import MANIFEST_FILE, FileEntry, Manifest, is_model_name

__all__ = ["ModelVersion", "Repository", "describe_files"]

_VERSION_NAME = re.compile(r"[1-9][0-9]{0,9}")
_PUSH_PREFIX = ".push-"
_STALE_PUSH_S = 24 * 3600
_READ_ONLY = 0o444
_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model: its folder and what its manifest says."""

    folder: Path
    manifest: Manifest

    def verify(self) -> None:
        """Checks every file against the digest that was taken when it was pushed.

        Raises:
            DigestMismatch: Names each file that is missing, extra or different, and each symbolic
                link.
        """
        faults = []
        found: set[str] = set()
        for relative, entry in _walk(self.folder):
            if relative == MANIFEST_FILE and not entry.is_symlink():
                continue
            found.add(relative)
            fault = _fault_of(relative, entry, self.manifest.files.get(relative))
            if fault:
                faults.append(fault)
        faults.extend(f"{path} is missing" for path in self.manifest.files if path not in found)
        if faults:
            raise DigestMismatch(
                f"{self.manifest.model} version {self.manifest.version} is not what was pushed "
                f"({self.folder}): {'; '.join(faults)}. Mend: push it again, or restore the files"
            )


def _fault_of(relative: str, entry: os.DirEntry[str], expected: FileEntry | None) -> str:
    if entry.is_symlink():
        return f"{relative} is a symbolic link, which a version may not hold"
    if expected is None:
        return f"{relative} is extra: the manifest does not list it"
    actual = _describe(Path(entry.path), expected.size_bytes)
    if actual == expected:
        return ""
    if actual.size_bytes != expected.size_bytes:
        return (
            f"{relative} has {actual.size_bytes} bytes, expected {expected.size_bytes} "
            f"(sha256 {expected.sha256})"
        )
    return f"{relative} has sha256 {actual.sha256}, expected {expected.sha256}"


def _describe(path: Path, expected_size: int | None = None) -> FileEntry:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if expected_size is not None and size != expected_size:
            # Gigabytes need not be read to know that they are the wrong ones.
            return FileEntry(sha256="0" * 64, size_bytes=size)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, size_bytes=size)


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Digest and size of every file under a folder but the manifest, by relative POSIX path.

    Raises:
        RepositoryError: It holds a symbolic link, or something that is neither file nor folder.
    """
    files = {}
    for relative, entry in _walk(folder):
        if entry.is_symlink() or not entry.is_file():
            raise RepositoryError(f"{relative}: a version holds plain files and folders only")
        if relative != MANIFEST_FILE:
            files[relative] = _describe(Path(entry.path))
    return dict(sorted(files.items()))


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything under a folder that is not a folder itself, links included, never followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            relative = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{relative}/")
            else:
                yield relative, entry


class Repository:
    """A folder of models.

    Args:
        root: It need not exist before the first push.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def models(self) -> list[str]:
        """The models that have at least one version, sorted."""
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RepositoryError(f"repository {self.root} cannot be read: {error}") from error
        return sorted(name for name in names if is_model_name(name) and self._numbers(name))

    def versions(self, model: str) -> list[int]:
        """The versions of a model, oldest first.

        Raises:
            RepositoryError: No such model.
        """
        numbers = self._numbers(_checked(model))
        if not numbers:
            known = self.models()
            have = f"It has: {', '.join(known)}" if known else "It has no models yet"
            raise RepositoryError(
                f"repository {self.root} has no model {model!r}.{suggest(model, known)} {have}"
            )
        return numbers

    def version(self, model: str, version: int) -> ModelVersion:
        """One version, with its manifest read and checked; its files are not (see `verify`).

        Raises:
            RepositoryError: No such model or version, or the manifest is another version's.
            ConfigInvalid: The manifest has faults.
        """
        numbers = self.versions(model)
        if version not in numbers:
            raise RepositoryError(
                f"model {model!r} has no version {version} in {self.root}. "
                f"It has: {', '.join(map(str, numbers))}"
            )
        folder = self.root / model / str(version)
        path = folder / MANIFEST_FILE
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RepositoryError(f"{path} cannot be read: {error}") from error
        manifest = Manifest.from_json(text, str(path))
        if (manifest.model, manifest.version) != (model, version):
            raise RepositoryError(
                f"{folder} holds the manifest of {manifest.model!r} version {manifest.version}. "
                "A version is pushed, not copied or renamed: push it again under its own name"
            )
        return ModelVersion(folder, manifest)

    def add_version(self, model: str, write: Callable[[int, Path], Manifest]) -> ModelVersion:
        """Adds the next version: all of it, or nothing.

        Args:
            model: The model's name.
            write: Gets the number that the version will probably have, and an empty folder. It
                writes the files and returns the manifest, which is written by this method. Where
                another push took the number meanwhile, the manifest's is raised.

        Returns:
            The version as it was read back.

        Raises:
            RepositoryError: The name is not a model's, or the folder cannot be written.
        """
        home = self.root / _checked(model)
        try:
            _remove_stale_pushes(home)
            # Not tempfile.mkdtemp: its 0700 would hide the version from a replica's user.
            staged = home / f"{_PUSH_PREFIX}{secrets.token_hex(8)}"
            staged.mkdir(parents=True)
        except OSError as error:
            raise RepositoryError(f"{home} cannot be written: {error}") from error
        try:
            number = _next_number(home)
            manifest = write(number, staged)
            return self._publish(home, staged, manifest)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            with suppress(OSError):
                home.rmdir()
            raise

    def _publish(self, home: Path, staged: Path, manifest: Manifest) -> ModelVersion:
        if manifest.model != home.name:
            raise RepositoryError(f"the manifest is {manifest.model!r}'s, the push {home.name!r}'s")
        listed = describe_files(staged)
        if listed != manifest.files:
            raise RepositoryError(
                f"the manifest lists {list(manifest.files)}, the folder holds {list(listed)}"
            )
        for relative in listed:
            path = staged / relative
            path.chmod(_READ_ONLY)
            _sync(path)
        for parent in {staged / PurePosixPath(relative).parent for relative in listed}:
            _sync(parent)
        number = manifest.version
        while True:
            manifest = manifest.model_copy(update={"version": number})
            path = staged / MANIFEST_FILE
            path.unlink(missing_ok=True)
            path.write_text(manifest.to_json(), encoding="utf-8")
            path.chmod(_READ_ONLY)
            _sync(path)
            _sync(staged)
            try:
                staged.rename(home / str(number))
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise RepositoryError(f"{home} cannot be written: {error}") from error
                number = max(number + 1, _next_number(home))
                continue
            _sync(home)
            return self.version(manifest.model, number)

    def _numbers(self, model: str) -> list[int]:
        try:
            with os.scandir(self.root / model) as entries:
                numbers = [
                    int(entry.name)
                    for entry in entries
                    if _VERSION_NAME.fullmatch(entry.name)
                    and entry.is_dir(follow_symlinks=False)
                    and Path(entry.path, MANIFEST_FILE).is_file()
                ]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RepositoryError(f"{self.root / model} cannot be read: {error}") from error
        return sorted(numbers)


def _checked(model: str) -> str:
    if not is_model_name(model):
        raise RepositoryError(
            f"{model!r} is not a model name: letters, digits, '.', '_' and '-', at most 128, "
            "starting with a letter or digit, no '..'"
        )
    return model


def _next_number(home: Path) -> int:
    # Anything with a number for its name counts: whatever it is, the number is taken.
    taken = [int(entry.name) for entry in home.iterdir() if _VERSION_NAME.fullmatch(entry.name)]
    return max(taken, default=0) + 1


def _remove_stale_pushes(home: Path) -> None:
    now = time.time()
    for entry in home.glob(f"{_PUSH_PREFIX}*"):
        with suppress(OSError):
            if now - entry.stat().st_mtime > _STALE_PUSH_S:
                shutil.rmtree(entry, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
