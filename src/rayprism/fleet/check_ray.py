"""What Ray itself would say about a Serve file, and what it would silently swallow.

`serve deploy` validates one model at a time and stops at the first validator that raises, accepts
keys that it does not know, and leaves some fields (`autoscaling_config`) to be checked in the
cluster. Here all of it is asked at once.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rayprism.core.tensors import suggest
from rayprism.errors import Fault
from rayprism.fleet.document import Document, join_path

__all__ = ["ray_faults", "ray_warnings"]

_MOVED = {
    "host": "set `http_options.host` at the top of the file instead",
    "port": "set `http_options.port` at the top of the file instead",
}
_FREE_FORM = frozenset(
    {"args", "user_config", "runtime_env", "resources", "request_router_kwargs", "init_kwargs"}
)
"""Keys whose contents are not Ray's."""
_IMPORTED = frozenset({"autoscaling_config", "policy"})
"""Keys that make Ray import code while it validates; without it the rest can be checked."""


def ray_faults(document: Document) -> list[Fault]:
    """Every fault that Ray's schema finds, and keys that Ray would ignore."""
    # Seconds of import, and only this command needs it.
    from ray.serve.schema import ServeDeploySchema

    data = document.data
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else f"{data!r:.60}"
        return [document.fault("", f"got {kind}, allowed is a mapping with `applications:`")]
    if "applications" not in data and "import_path" in data:
        return [
            document.fault(
                "import_path",
                "the old format for one application, which `serve deploy` refuses. Write "
                "`applications:` and put this under it as a list item",
            )
        ]
    found = [
        *_schema_faults(ServeDeploySchema, data, ""),
        *_swallowed(ServeDeploySchema, data, ""),
        *_across_applications(data),
    ]
    return [document.fault(path, message) for path, message in dict.fromkeys(found)]


def ray_warnings(document: Document) -> list[Fault]:
    """What Ray accepts, but probably means something else than was meant."""
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(document.data, dict):
        return []
    return [
        document.fault(path, f"{value!r} is a number written as a string. Take the quotes off")
        for path, value, annotation in _fields(ServeDeploySchema, document.data, "")
        if isinstance(value, str)
        and _takes(annotation, (int, float), (bool, dict, str))
        and _is_number(value)
    ]


def _schema_faults(schema: type[BaseModel], data: Any, path: str) -> Iterator[tuple[str, str]]:
    """Validates, takes away what a validator blamed, and validates again until nothing is new."""
    if not isinstance(data, dict):
        yield path, f"got {data!r:.60}, allowed is a mapping"
        return
    children = list(_children(schema, data, path))
    for child_schema, value, child_path in children:
        yield from _schema_faults(child_schema, value, child_path)
    # The children were validated above; here they would only hide this level's own validators.
    left = _without(data, path, [child_path for _, _, child_path in children])
    said: set[str] = set()
    for _ in range(len(data) + 1):
        try:
            schema.model_validate(_copy(left))
            return
        except ValidationError as error:
            problems, blamed = _problems(error, left)
        except ImportError:
            # Some validators import what is named; it may be there on the cluster only.
            if not any(left.get(key) for key in _IMPORTED):
                return
            left = {key: {} if key in _IMPORTED else value for key, value in left.items()}
            continue
        except Exception as error:
            # Validators of Ray that trip over a wrong type raise whatever Python raised.
            yield path, f"Ray cannot read this: {type(error).__name__}: {error}"
            return
        for place, message in problems.items():
            # What was taken away goes back to its default, which may clash with what is left.
            if message == "missing" or message not in said:
                yield _join(path, place), message
            said.add(message)
        left = {key: value for key, value in left.items() if key not in blamed}
        if not blamed or any(name in blamed for name in _required(schema)):
            return  # what comes next would be of our own making


def _problems(
    error: ValidationError, data: Mapping[str, Any]
) -> tuple[dict[tuple[str | int, ...], str], set[str]]:
    """What a validation says, by place, and the keys that are to blame for it."""
    problems: dict[tuple[str | int, ...], str] = {}
    blamed: set[str] = set()
    for item in error.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            continue  # `_swallowed` says it, with a suggestion
        place = _place(item["loc"], data, is_missing=item["type"] == "missing")
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if item["type"] == "missing":
            message = "missing"
        elif place:
            given = item.get("input")
            if not isinstance(given, (dict, list)) and "got" not in message.lower():
                message = f"{message}; got {given!r:.80}"
        else:
            # A validator of the whole: whatever it names is to blame, the first most of all.
            named = _named_keys(message, data)
            blamed.update(named)
            place = tuple(named[:1])
        if place and place[0] in data:
            blamed.add(str(place[0]))
        # Each branch of a union complains for itself.
        problems[place] = f"{problems[place]}, or: {message}" if place in problems else message
    return problems, blamed


def _join(path: str, parts: tuple[str | int, ...]) -> str:
    for part in parts:
        path = join_path(path, part)
    return path


def _required(schema: type[BaseModel]) -> list[str]:
    return [name for name, field in schema.model_fields.items() if field.is_required()]


def _copy(data: Any) -> Any:
    # Some of Ray's validators write into the dict that they are given.
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_copy(value) for value in data]
    return data


def _without(data: dict[str, Any], path: str, children: list[str]) -> dict[str, Any]:
    left = dict(data)
    for key, value in data.items():
        here = join_path(path, key)
        if here in children:
            # An autoscaling_config excludes a fixed num_replicas: that it is there must stay.
            if key != "autoscaling_config":
                del left[key]
        elif isinstance(value, list) and any(child.startswith(f"{here}[") for child in children):
            left[key] = []
    return left


def _place(
    location: tuple[str | int, ...], data: Any, *, is_missing: bool
) -> tuple[str | int, ...]:
    """Where in the file a pydantic error is."""
    place: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and (part in data or is_missing):
            place.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            place.append(part)
            data = data[part]
        # Anything else names a branch of a union or a validator, not a place in the file.
    return tuple(place)


def _named_keys(message: str, data: Mapping[str, Any]) -> list[str]:
    """The keys of `data` that a message names, in its order."""
    found = [
        (match.start(), str(key))
        for key in data
        if (match := re.search(rf"\b{re.escape(str(key))}\b", message))
    ]
    return [key for _, key in sorted(found)]


def _swallowed(schema: type[BaseModel], data: Any, path: str) -> Iterator[tuple[str, str]]:
    """Keys that Ray does not know, and booleans where Ray would read 0 or 1."""
    if not isinstance(data, dict):
        return
    known = _known(schema)
    for key in data:
        if isinstance(key, str) and key not in known and key not in schema.model_fields:
            hint = suggest(key, known) or f" Allowed: {', '.join(sorted(known))}"
            yield join_path(path, key), f"unknown key, which Ray ignores.{hint}"
    for name, value in data.items():
        field = known.get(name)
        if (
            isinstance(value, bool)
            and field is not None
            and _takes(field, (int, float), (bool, dict))
        ):
            yield join_path(path, name), f"{str(value).lower()} is not a number"
    for child_schema, value, child_path in _children(schema, data, path):
        yield from _swallowed(child_schema, value, child_path)


def _fields(schema: type[BaseModel], data: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(data, dict):
        return
    known = _known(schema)
    for key, value in data.items():
        if key in known:
            yield join_path(path, str(key)), value, known[key]
    for child_schema, value, child_path in _children(schema, data, path):
        yield from _fields(child_schema, value, child_path)


def _known(schema: type[BaseModel]) -> dict[str, Any]:
    known = {}
    for name, field in schema.model_fields.items():
        if name.startswith("_") or (name in _MOVED and "import_path" in schema.model_fields):
            continue
        known[field.alias or name] = field.annotation
    return known


def _children(
    schema: type[BaseModel], data: Mapping[str, Any], path: str
) -> Iterator[tuple[type[BaseModel], Any, str]]:
    """The parts of `data` that have a schema of their own."""
    for key, annotation in _known(schema).items():
        if key in _FREE_FORM or key not in data or data[key] is None:
            continue
        child = _model_in(annotation)
        if child is None:
            continue
        value = data[key]
        here = join_path(path, key)
        if _takes_list(annotation):
            if isinstance(value, list):
                for index, item in enumerate(value):
                    yield child, item, join_path(here, index)
        else:
            yield child, value, here


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _takes_list(annotation: Any) -> bool:
    if typing.get_origin(annotation) is list:
        return True
    return any(_takes_list(argument) for argument in typing.get_args(annotation))


def _takes(annotation: Any, some: tuple[type, ...], none: tuple[type, ...]) -> bool:
    """Whether a field takes one of `some` types and none of the others."""
    if typing.get_origin(annotation) in (list, dict):
        return False
    leaves = list(_leaves(annotation))
    return any(leaf in some for leaf in leaves) and not any(leaf in none for leaf in leaves)


def _leaves(annotation: Any) -> Iterator[Any]:
    arguments = typing.get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _leaves(argument)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _across_applications(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What must hold between applications; Ray looks at it only when each of them is right."""
    applications = data.get("applications")
    if not isinstance(applications, list):
        return
    if not applications:
        yield "applications", "empty: deploying this would delete every running application"
    for key, default in (("name", "default"), ("route_prefix", "/")):
        first: dict[Any, int] = {}
        for index, application in enumerate(applications):
            if not isinstance(application, dict):
                continue
            value = application.get(key, default)
            if not isinstance(value, str):
                continue
            path = f"applications[{index}].{key}"
            if value in first:
                shown = "" if key in application else " (by default)"
                yield path, f"{value!r}{shown} is also applications[{first[value]}]'s"
            first.setdefault(value, index)
            if key == "name" and not value:
                yield path, "an application needs a name"
            if key == "route_prefix":
                yield from ((path, message) for message in _route_faults(value))
    for index, application in enumerate(applications):
        for key, where in _MOVED.items():
            if isinstance(application, dict) and key in application:
                yield f"applications[{index}].{key}", f"not for one application: {where}"


def _route_faults(route: str) -> Iterator[str]:
    if not route.startswith("/"):
        yield f"{route!r} must start with '/'"
    if len(route) > 1 and route.endswith("/"):
        yield f"{route!r} must not end with '/'"
    if "{" in route or "}" in route:
        yield f"{route!r} must not hold '{{' or '}}'"
