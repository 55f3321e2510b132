"""A Serve YAML file, changed as an operator would change it: only the lines that are meant."""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayprism.errors import ConfigInvalid, Fault
from rayprism.fleet.document import load_document
from rayprism.fleet.edits import Edit, apply_edits, difference
from rayprism.fleet.yaml_text import CannotRewrite, rewrite

__all__ = ["ServeFile"]


class ServeFile:
    """A file for `serve deploy`. Made by `load`.

    Args:
        path: Where it is; a link is followed.
        raw: Its bytes.
    """

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path = path
        self._raw = raw
        self._text = raw.decode("utf-8")
        self._data: dict[str, Any] = _plain(yaml.safe_load(self._text))

    @classmethod
    def load(cls, path: Path) -> ServeFile:
        """Reads a file as Serve does.

        Raises:
            ConfigInvalid: It cannot be read, is not YAML, or is no Serve file; with the lines.
        """
        document = load_document(path)
        if document.faults:
            raise ConfigInvalid(document.source, document.faults)
        data = document.data
        if not isinstance(data, dict) or not isinstance(data.get("applications"), list):
            fault = document.fault("applications", "missing: a Serve file is a list of them")
            raise ConfigInvalid(document.source, [fault])
        return cls(path, path.read_bytes())

    @property
    def applications(self) -> list[str]:
        """Names of the applications, in the order of the file."""
        items = self._data.get("applications") or []
        return [str(app.get("name", "default")) for app in items if isinstance(app, dict)]

    def differences_from(self, config: Mapping[str, Any], applications: Collection[str]) -> str:
        """How the file differs from a config in some applications.

        Args:
            config: What runs (`live_config`).
            applications: The names of those that matter.

        Returns:
            A diff for people, from what runs to the file; empty where both say the same. How a
            version is written, the order of keys and keys without a value do not matter.
        """
        return difference(
            {"applications": _comparable(config, applications)},
            {"applications": _comparable(self._data, applications)},
            labels=("as it runs", f"in {self.path.name}"),
        )

    def apply(self, edits: Sequence[Edit]) -> None:
        """Makes changes in the text; `save` writes it. All of them, or none.

        Raises:
            ConfigInvalid: An application that is to be changed is not in the file, or a change
                cannot be made without touching more than is meant.
        """
        data = _plain(self._data)
        try:
            apply_edits(data, edits)
        except ConfigInvalid as error:
            raise ConfigInvalid(str(self.path), error.faults) from None
        try:
            text = rewrite(self._text, data)
        except CannotRewrite as error:
            names = ", ".join(dict.fromkeys(edit.application for edit in edits))
            fault = Fault(
                "",
                f"cannot be changed line by line: {error}. Make the change of {names} by hand; "
                "`rayprism check` tells whether the file is right",
            )
            raise ConfigInvalid(str(self.path), [fault]) from None
        self._text, self._data = text, data

    def difference(self) -> str:
        """What `save` would change: a unified diff of the text, empty where nothing."""
        before = self._raw.decode("utf-8").splitlines(keepends=True)
        after = self._text.splitlines(keepends=True)
        name = str(self.path)
        lines = list(difflib.unified_diff(before, after, name, name))
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    def save(self) -> None:
        """Writes the file, whole or not at all; its mode stays.

        Raises:
            ConfigInvalid: It cannot be written, or somebody else changed it since it was read.
        """
        new = self._text.encode("utf-8")
        if new == self._raw:
            return
        path = self.path.resolve()
        try:
            if path.read_bytes() != self._raw:
                message = "was changed by somebody else meanwhile; nothing was written"
                raise ConfigInvalid(str(self.path), [Fault("", message)])
            _write(path, new)
        except OSError as error:
            message = f"cannot be written: {error.strerror or error}"
            raise ConfigInvalid(str(self.path), [Fault("", message)]) from None
        self._raw = new


def _write(path: Path, content: bytes) -> None:
    before = path.stat()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            # Only root may give a file away; for others it is theirs anyway.
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """A copy in which nothing is shared: a change behind an alias would be one of two places."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _comparable(config: Mapping[str, Any], applications: Collection[str]) -> list[Any]:
    found = {
        str(app.get("name", "default")): app
        for app in config.get("applications") or []
        if isinstance(app, Mapping)
    }
    return [_normal("", {**found[name], "name": name}) for name in applications if name in found]


def _normal(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _normal(name, item)
            for name, item in sorted(value.items())
            # No route is something else than Serve's default.
            if item is not None or name == "route_prefix"
        }
    if isinstance(value, list):
        return [_normal("", item) for item in value]
    return str(value) if key == "version" and type(value) is int else value
