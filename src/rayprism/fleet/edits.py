"""Changes of a Serve config as values: planned once, made in what runs and in the file alike."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import yaml

from rayprism.errors import ConfigInvalid, Fault

__all__ = [
    "ABSENT",
    "Absent",
    "Edit",
    "apply_edits",
    "difference",
    "inverse_edits",
    "live_config",
    "masked",
    "value_at",
]


class Absent(enum.Enum):
    """The type of `ABSENT`."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
"""In place of a value: there is none, or it is to be taken out."""

_DEFAULT_NAME = "default"
"""Serve's name for an application that has none."""
_NAMED_LISTS = frozenset({"applications", "deployments"})
_MASK = "***"
_SECRET = re.compile(
    # Not `max_tokens` and `tokenizer`: those are about text.
    r"password|passwd|secret|credential|token(?!iz|s(?![a-z]))|api[_-]?key|private[_-]?key",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a Serve config or file.

    Args:
        application: Its name.
        path: Keys from the application down to what changes, as in `("args", "version")` or
            `("deployments", "model", "user_config", "traffic")`: a list of mappings is stepped
            into by the `name` of an item. Empty: the whole application.
        value: What is to be there, as plain JSON values, or `ABSENT`.
    """

    application: str
    path: tuple[str, ...]
    value: Any


def live_config(details: Mapping[str, Any]) -> dict[str, Any]:
    """The config that would bring about what runs, as `PUT /api/serve/applications/` takes it.

    Applications that were not deployed by a config (`serve.run`) are left out: Serve leaves those
    alone. So are those that are being deleted, or they would come back.

    Args:
        details: What the same address answers to GET.
    """
    config: dict[str, Any] = {}
    for key in ("proxy_location", "target_capacity"):
        if details.get(key) is not None:
            config[key] = details[key]
    for key in ("http_options", "grpc_options"):
        options = details.get(key)
        if isinstance(options, Mapping):
            config[key] = {name: value for name, value in options.items() if value is not None}
    applications = details.get("applications") or {}
    config["applications"] = [
        # What was put without a name has none here either; edits go by it.
        {"name": name, **app["deployed_app_config"]}
        for name, app in applications.items()
        if app.get("deployed_app_config") and app.get("status") != "DELETING"
    ]
    return deepcopy(config)


def value_at(config: Mapping[str, Any], application: str, path: Sequence[str]) -> Any:
    """What is at a path of an application; `ABSENT` where there is nothing.

    Args:
        config: A Serve config or the data of a Serve file.
        application: Its name.
        path: As in `Edit`.
    """
    node: Any = _find(config.get("applications"), application)
    for key in path:
        if node is ABSENT:
            return ABSENT
        node = _step(node, key)
    return node


def apply_edits(config: MutableMapping[str, Any], edits: Sequence[Edit]) -> None:
    """Makes the changes, in place and in order.

    What is missing on the way to a new value is made: a deployment, its `user_config`. Nothing is
    taken out but what an edit names, so a `user_config` that loses its last key stays as `{}`.
    Serve would not tell the replicas of one that is gone, and they would keep what it said.

    A version stays written as it was: 4 and "4" mean the same.

    Args:
        config: A Serve config or the data of a Serve file: plain dicts and lists.
        edits: The changes.

    Raises:
        ConfigInvalid: An application that is to be changed is not there, or something on the way
            is neither a mapping nor a list of mappings with names. The config may be half changed
            then.
    """
    for edit in edits:
        if not edit.path:
            _replace_application(config, edit)
            continue
        application = _find(config.get("applications"), edit.application)
        if application is ABSENT:
            if edit.value is ABSENT:
                continue
            raise _missing(config, edit.application)
        _set(application, edit)


def inverse_edits(config: Mapping[str, Any], edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The changes that take others back: applied after them, they bring back what was.

    Containers that were made on the way stay, empty (see `apply_edits`), and an application that
    was taken out comes back at the end of the list.

    Args:
        config: As it is before the changes; it is not touched.
        edits: The changes that are to be taken back.
    """
    now = _plain(config)
    inverse = []
    for edit in edits:
        before = deepcopy(value_at(now, edit.application, edit.path))
        inverse.append(Edit(edit.application, edit.path, before))
        apply_edits(now, [edit])
    return tuple(reversed(inverse))


def difference(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    labels: tuple[str, str] = ("now", "then"),
) -> str:
    """What changes between two configs, for people: a unified diff of their YAML.

    Args:
        before: A Serve config.
        after: Another.
        labels: What the two are called.

    Returns:
        Only the applications that differ, secrets masked; empty where none does.
    """
    old, new = _by_name(before), _by_name(after)
    shown = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) == new.get(name):
            continue
        one, other = (f"{name} {label}" for label in labels)
        lines = difflib.unified_diff(_lines(old.get(name)), _lines(new.get(name)), one, other, n=3)
        shown.append("".join(lines))
    return "".join(shown)


def masked(config: Any) -> Any:
    """A copy without secrets, for eyes and journals.

    `***` stands for the values of environment variables, for what has a key like `password`,
    `secret`, `token`, `credential` or `api_key`, and for the user in a URL.
    """
    return _masked(config, hide=False)


def _masked(value: Any, *, hide: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _masked(item, hide=hide or key == "env_vars" or bool(_SECRET.search(str(key))))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_masked(item, hide=hide) for item in value]
    if hide and value is not None:
        return _MASK
    return _USER_INFO.sub(_MASK, value) if isinstance(value, str) else value


def _lines(application: Any) -> list[str]:
    if application is None:
        return []
    text = yaml.safe_dump(masked(application), sort_keys=False, allow_unicode=True, width=1000)
    return text.splitlines(keepends=True)


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    return {_name_of(app): app for app in _mappings(config.get("applications"))}


def _mappings(value: Any) -> Iterator[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        yield from (item for item in value if isinstance(item, Mapping))


def _name_of(item: Mapping[str, Any]) -> str:
    return str(item.get("name", _DEFAULT_NAME))


def _find(items: Any, name: str) -> Any:
    return next((item for item in _mappings(items) if _name_of(item) == name), ABSENT)


def _step(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return node.get(key, ABSENT)
    return _find(node, key)


def _replace_application(config: MutableMapping[str, Any], edit: Edit) -> None:
    old = _find(config.get("applications"), edit.application)
    if old is ABSENT:
        if edit.value is not ABSENT:
            if config.get("applications") is None:
                config["applications"] = []
            config["applications"].append(deepcopy(edit.value))
        return
    items = config["applications"]
    index = next(index for index, item in enumerate(items) if item is old)
    if edit.value is ABSENT:
        del items[index]
    elif old != edit.value:
        items[index] = deepcopy(edit.value)


def _set(application: MutableMapping[str, Any], edit: Edit) -> None:
    node: Any = application
    done: list[str] = []
    for key in edit.path[:-1]:
        child = _step(node, key)
        # `user_config:` with nothing behind it is None, and as good as missing.
        if child is ABSENT or child is None:
            if edit.value is ABSENT:
                return
            child = _put(node, key, [] if key in _NAMED_LISTS else {})
        done.append(key)
        if not isinstance(child, (MutableMapping, MutableSequence)):
            raise _not_a_mapping(edit, done, child)
        node = child
    if not isinstance(node, (MutableMapping, MutableSequence)):
        raise _not_a_mapping(edit, done, node)
    key = edit.path[-1]
    old = _step(node, key)
    if edit.value is ABSENT:
        if old is not ABSENT:
            _take_out(node, key, old)
        return
    new = _written_alike(key, old, edit.value)
    if old is ABSENT or not _equal(old, new):
        _put(node, key, new)


def _put(node: Any, key: str, value: Any) -> Any:
    """Puts a value behind a key, or an item of that name into a list; returns what is there."""
    if isinstance(node, MutableMapping):
        node[key] = value
        return value
    old = _find(node, key)
    item = {"name": key, **value}
    if old is ABSENT:
        node.append(item)
    else:
        node[next(index for index, found in enumerate(node) if found is old)] = item
    return item


def _take_out(node: Any, key: str, old: Any) -> None:
    if isinstance(node, MutableMapping):
        del node[key]
    else:
        del node[next(index for index, found in enumerate(node) if found is old)]


def _equal(old: Any, new: Any) -> bool:
    # 1, 1.0 and True are one to Python, and not to a file.
    return bool(old == new) and repr(_plain(old)) == repr(_plain(new))


def _plain(value: Any) -> Any:
    """A copy in which nothing is shared, as aliases of YAML are."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _written_alike(key: str, old: Any, new: Any) -> Any:
    """A copy of the new value in which versions are numbers or strings as they were."""
    if isinstance(new, Mapping):
        before = old if isinstance(old, Mapping) else {}
        return {name: _written_alike(name, before.get(name), item) for name, item in new.items()}
    if isinstance(new, (list, tuple)):
        known = {str(item.get("version")): item for item in _mappings(old)}
        return [
            _written_alike(
                "", known.get(str(item.get("version"))) if isinstance(item, Mapping) else None, item
            )
            for item in new
        ]
    if key == "version" and type(old) is int and isinstance(new, str) and new.isdecimal():
        return int(new)
    if key == "version" and isinstance(old, str) and type(new) is int:
        return str(new)
    return new


def _missing(config: Mapping[str, Any], name: str) -> ConfigInvalid:
    known = ", ".join(_by_name(config)) or "none"
    return ConfigInvalid(
        "applications", [Fault("", f"there is no application {name!r}. There are: {known}")]
    )


def _not_a_mapping(edit: Edit, done: Sequence[str], got: Any) -> ConfigInvalid:
    message = f"got {got!r:.80}, allowed is a mapping"
    return ConfigInvalid(f"application {edit.application!r}", [Fault(".".join(done), message)])
