"""How the dashboard that Grafana has differs from the one that is to be."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Difference",
    "compare_dashboards",
    "digest_dashboard",
    "is_ours",
    "with_datasource",
    "with_datasource_of",
]

TAG = "rayprism"
"""Every dashboard of ours has it; a dashboard without it is somebody else's."""

_VARIABLE = "datasource"
_MAX_NAMES = 5
# Grafana's own bookkeeping. A newer Grafana raises the version of the schema by itself.
_BOOKKEEPING = frozenset({"id", "version", "iteration", "schemaVersion"})
_PANEL_BOOKKEEPING = frozenset({"pluginVersion"})
_PLACE = frozenset({"id", "gridPos", "panels"})


@dataclass(frozen=True, slots=True)
class Difference:
    """What a push would change.

    Args:
        added: Titles of panels that are not there.
        removed: Titles of panels that are there and are not to be.
        changed: Titles of panels that are there and are other.
        settings: What else of the dashboard is other, as its JSON calls it; `layout` for panels
            that only stand elsewhere.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.settings)

    def __str__(self) -> str:
        said = [
            ("added", self.added),
            ("removed", self.removed),
            ("changed", self.changed),
            ("settings", self.settings),
        ]
        return "; ".join(f"{name} {_shortened(items)}" for name, items in said if items)


def compare_dashboards(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> Difference:
    """What has to change for `there` to become `wanted`.

    Ignores what Grafana keeps in a dashboard for itself, and whether a setting that is empty is
    written out.
    """
    old, new = dict(_panels(there)), dict(_panels(wanted))
    both = [key for key in new if key in old]
    changed = [key for key in both if _without(old[key], _PLACE) != _without(new[key], _PLACE)]
    # Their order as well: it is that of reading on a narrow screen.
    moved = [
        [(key, panels[key].get("gridPos"), panels[key].get("id")) for key in both]
        for panels in (old, new)
    ]
    settings = _different_settings(there, wanted)
    if moved[0] != moved[1] or [k for k in old if k in new] != both:
        settings.append("layout")
    return Difference(
        added=tuple(_title(key) for key in new if key not in old),
        removed=tuple(_title(key) for key in old if key not in new),
        changed=tuple(_title(key) for key in changed),
        settings=tuple(settings),
    )


def digest_dashboard(wanted: Mapping[str, Any]) -> str:
    """A short name for a dashboard's content, the same for what compares as the same."""
    text = json.dumps(_comparable(wanted), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_ours(model: Mapping[str, Any]) -> bool:
    """Whether a dashboard has our tag."""
    return TAG in (model.get("tags") or ())


def with_datasource(model: Mapping[str, Any], name: str, uid: str) -> dict[str, Any]:
    """The dashboard, with its variable `datasource` set to a datasource."""
    return _with_current(model, {"text": name, "value": uid})


def with_datasource_of(model: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """The dashboard, with the datasource that the one in Grafana has."""
    for variable in _datasource_variables(there):
        return _with_current(model, variable.get("current") or {}, replace=True)
    return dict(model)


def _with_current(
    model: Mapping[str, Any], current: Mapping[str, Any], *, replace: bool = False
) -> dict[str, Any]:
    made = copy.deepcopy(dict(model))
    for variable in _datasource_variables(made):
        kept = {} if replace else variable.get("current") or {}
        variable["current"] = {**kept, **current}
    return made


def _datasource_variables(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    variables = (model.get("templating") or {}).get("list") or []
    return [
        variable
        for variable in variables
        if variable.get("name") == _VARIABLE and variable.get("type") == "datasource"
    ]


_Key = tuple[str, int]
"""A panel's title, and the how-manieth of this title it is."""


def _panels(model: Mapping[str, Any]) -> Iterator[tuple[_Key, dict[str, Any]]]:
    counts: Counter[str] = Counter()
    for panel in _flat(model.get("panels") or []):
        title = str(panel.get("title") or f"{panel.get('type')} without a title")
        counts[title] += 1
        yield (title, counts[title]), _comparable(panel, _PANEL_BOOKKEEPING)


def _flat(panels: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        yield panel
        yield from _flat(panel.get("panels") or [])  # of a row that is folded


def _title(key: _Key) -> str:
    title, number = key
    return title if number == 1 else f"{title} ({number})"


def _different_settings(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    old, new = _comparable(there), _comparable(wanted)
    keys = [key for key in {**new, **old} if key != "panels"]
    return sorted(key for key in keys if old.get(key) != new.get(key))


def _comparable(
    model: Mapping[str, Any], bookkeeping: frozenset[str] = _BOOKKEEPING
) -> dict[str, Any]:
    kept = _without(model, bookkeeping)
    if isinstance(kept.get("annotations"), Mapping):
        # Grafana's own annotations are in every dashboard, once it was saved in a browser.
        listed = kept["annotations"].get("list") or []
        own = [item for item in listed if not item.get("builtIn")]
        kept["annotations"] = {**kept["annotations"], "list": own}
    if bookkeeping is _BOOKKEEPING and "panels" in kept:
        kept["panels"] = [_comparable(panel, _PANEL_BOOKKEEPING) for panel in kept["panels"]]
    found: dict[str, Any] = _without_empty(kept)
    return found


def _without(model: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in keys}


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, [], {})}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    rest = len(names) - _MAX_NAMES
    return shown if rest <= 0 else f"{shown} and {rest} more"
