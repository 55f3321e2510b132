"""Our dashboards in a Grafana: what has to be written there, writing it, and what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rayprism.errors import ConfigInvalid, Fault, SetupError
from rayprism.fleet.dashboard_changes import (
    TAG,
    Difference,
    compare_dashboards,
    digest_dashboard,
    is_ours,
    with_datasource,
    with_datasource_of,
)
from rayprism.fleet.grafana import GrafanaClient, StoredDashboard
from rayprism.fleet.grafana_errors import GrafanaError

__all__ = [
    "DATASOURCE_UID",
    "FoundDashboard",
    "PushSettings",
    "Step",
    "load_dashboards",
    "plan_push",
    "survey_dashboards",
    "write_dashboards",
]

DATASOURCE_UID = "rayprism-prometheus"
_DATASOURCE_NAME = "rayprism Prometheus"
_PROMETHEUS = "prometheus"
_UID = re.compile(r"[A-Za-z0-9_-]{1,40}")
# The scrape interval, below which Grafana does not choose the step of a query.
_JSON_DATA = {"httpMethod": "POST", "timeInterval": "10s"}

Dashboards = Mapping[str, dict[str, Any]]
"""By the stem of their files."""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """Where dashboards are pushed to.

    Args:
        folder: Title or uid.
        datasource: Name or uid of one that is there. None: ours, the only Prometheus, or the
            default.
        prometheus_url: Make a datasource for this Prometheus, as Grafana reaches it.
        force: Write over dashboards that are not ours, and over versions that were not seen.
    """

    folder: str = "rayprism"
    datasource: str | None = None
    prometheus_url: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a push leaves there.

    Args:
        kind: `datasource`, `folder` or `dashboard`.
        name: Its name or title.
        action: What has to be done for it.
        details: What changes, in words.
        write: Does it.
    """

    kind: str
    name: str
    action: Literal["create", "update", "keep"]
    details: str = ""
    write: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class FoundDashboard:
    """One of our dashboards, and how it is in Grafana.

    Args:
        uid: Its uid.
        title: Its title.
        state: `current`, `outdated` (or changed by hand), `missing`, `foreign` (without our tag),
            or `unknown` (tagged as ours, but not of this version).
        folder: Where it is.
        url: Where to look at it.
        details: What a push would change.
    """

    uid: str
    title: str
    state: Literal["current", "outdated", "missing", "foreign", "unknown"]
    folder: str = ""
    url: str = ""
    details: str = ""


@dataclass(slots=True)
class _Folder:
    title: str
    uid: str | None = None
    """None until it is made."""


def load_dashboards(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The dashboards of this version, or those of a folder's JSON files.

    Raises:
        SetupError: What builds them is not installed, or there are no files.
        ConfigInvalid: Files that are not dashboards of ours.
    """
    if folder is not None:
        return _read_dashboards(folder)
    from rayprism.telemetry.dashboards import build_dashboards

    try:
        return build_dashboards()
    except SetupError as error:
        raise SetupError(f"{error}, or take the files of a folder with --from DIR") from None


def _read_dashboards(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SetupError(
            f"{folder} has no .json files. `rayprism dashboards write {folder}` makes them"
        )
    found: dict[str, dict[str, Any]] = {}
    faults = []
    for file in files:
        try:
            model = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            faults.append(Fault(file.name, f"cannot be read as JSON: {error}"))
            continue
        fault = _fault(model, [other["uid"] for other in found.values()])
        if fault:
            faults.append(Fault(file.name, fault))
        else:
            found[file.stem] = model
    if faults:
        raise ConfigInvalid(str(folder), faults)
    return found


def _fault(model: Any, uids: list[str]) -> str:
    if not isinstance(model, dict) or not all(
        isinstance(model.get(key), str) and model[key] for key in ("uid", "title")
    ):
        return "is not a dashboard: it has no `uid` or no `title`"
    if not _UID.fullmatch(model["uid"]):
        return f"has the uid {model['uid']!r}; allowed are 40 letters, digits, - and _"
    if not is_ours(model):
        return f"has no tag {TAG!r}, by which the next push knows that it is ours"
    if model["uid"] in uids:
        return f"has the uid {model['uid']!r}, which another file has too"
    return ""


def write_dashboards(dashboards: Dashboards, folder: Path) -> list[Path]:
    """Writes a JSON file each.

    Returns:
        Those that are new or other than before.
    """
    from rayprism.telemetry.dashboards.build import dashboard_text

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem, model in dashboards.items():
            path = folder / f"{stem}.json"
            text = dashboard_text(model)
            if not path.exists() or path.read_bytes() != text.encode():
                path.write_text(text, encoding="utf-8")
                written.append(path)
    except OSError as error:
        raise SetupError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return written


def plan_push(
    client: GrafanaClient, dashboards: Dashboards, settings: PushSettings
) -> tuple[Step, ...]:
    """Reads what is there, and says what to do, in this order. Writes nothing.

    Raises:
        GrafanaError: It cannot be read, there is no datasource, or a dashboard must not be
            written over.
    """
    source, uid, name = _plan_datasource(client, settings)
    folder, place = _plan_folder(client, settings.folder)
    steps = [source, folder]
    faults = []
    for model in dashboards.values():
        try:
            wanted = with_datasource(model, name, uid)
            steps.append(_plan_dashboard(client, wanted, place, settings.force))
        except _Kept as error:
            faults.append(str(error))
    if faults:
        raise GrafanaError("nothing was written:\n" + "\n".join(f"  {fault}" for fault in faults))
    return tuple(steps)


class _Kept(Exception):
    """A dashboard that must not be written over."""


def _plan_datasource(client: GrafanaClient, settings: PushSettings) -> tuple[Step, str, str]:
    there = client.datasources()
    if settings.prometheus_url is None:
        source = _choose_datasource(there, settings.datasource)
        name, uid = str(source["name"]), str(source["uid"])
        return Step("datasource", name, "keep"), uid, name
    wanted = {
        "uid": DATASOURCE_UID,
        "name": _DATASOURCE_NAME,
        "type": _PROMETHEUS,
        "access": "proxy",
        "url": settings.prometheus_url,
        "jsonData": _JSON_DATA,
    }
    if all(source.get("uid") != DATASOURCE_UID for source in there):
        write = partial(client.create_datasource, wanted)
        step = Step("datasource", _DATASOURCE_NAME, "create", settings.prometheus_url, write)
        return step, DATASOURCE_UID, _DATASOURCE_NAME
    return _plan_update(client, wanted)


def _plan_update(client: GrafanaClient, wanted: Mapping[str, Any]) -> tuple[Step, str, str]:
    stored = client.datasource(DATASOURCE_UID)
    name = str(stored["name"])
    # What an administrator added to it, as a login at Prometheus, stays.
    json_data = {**(stored.get("jsonData") or {}), **wanted["jsonData"]}
    merged = {**stored, **wanted, "name": name, "jsonData": json_data}
    other = [key for key in ("type", "access", "url", "jsonData") if stored.get(key) != merged[key]]
    if not other:
        return Step("datasource", name, "keep"), DATASOURCE_UID, name
    if stored.get("readOnly"):
        raise GrafanaError(
            f"the datasource {name!r} is provisioned from a file, with the URL {stored['url']}. "
            "Change it there, or leave --prometheus-url out"
        )
    details = f"changed {', '.join(other)}"
    if "url" in other:
        details += f": {stored.get('url')} -> {merged['url']}"
    write = partial(client.update_datasource, merged)
    return Step("datasource", name, "update", details, write), DATASOURCE_UID, name


def _choose_datasource(there: list[dict[str, Any]], wanted: str | None) -> Mapping[str, Any]:
    usable = [source for source in there if source.get("type") == _PROMETHEUS]
    names = ", ".join(repr(source["name"]) for source in usable)
    if wanted is not None:
        for source in usable:
            if wanted in (source["name"], source["uid"]):
                return source
        raise GrafanaError(
            f"no Prometheus datasource is named {wanted!r}. There "
            + (f"are: {names}" if usable else "is none; --prometheus-url URL makes one")
        )
    if not usable:
        raise GrafanaError(
            "this Grafana has no Prometheus datasource that the token may see. --prometheus-url "
            "http://prometheus:9090 makes one, with the address at which Grafana reaches Prometheus"
        )
    ours = [source for source in usable if source["uid"] == DATASOURCE_UID]
    default = [source for source in usable if source.get("isDefault")]
    if ours or default or len(usable) == 1:
        return (ours or default or usable)[0]
    raise GrafanaError(
        f"there is more than one Prometheus datasource, and none is the default: {names}. Say "
        "which with --datasource NAME"
    )


def _plan_folder(client: GrafanaClient, name: str) -> tuple[Step, _Folder]:
    found = client.find_folder(name)
    if found is not None:
        place = _Folder(str(found["title"]), str(found["uid"]))
        return Step("folder", place.title, "keep"), place
    place = _Folder(name)

    def create() -> None:
        place.uid = client.create_folder(name)

    return Step("folder", name, "create", write=create), place


def _plan_dashboard(
    client: GrafanaClient, wanted: dict[str, Any], place: _Folder, force: bool
) -> Step:
    title = str(wanted["title"])
    message = f"{_message()} ({digest_dashboard(wanted)})"

    def save(version: int | None) -> None:
        model = {key: value for key, value in wanted.items() if key not in ("id", "version")}
        if version is not None:
            model["version"] = version
        client.save_dashboard(model, place.uid or "", message, overwrite=force)

    stored = client.dashboard(wanted["uid"])
    if stored is None:
        return Step("dashboard", title, "create", write=partial(save, None))
    if not is_ours(stored.model) and not force:
        raise _Kept(
            f"{title}: the uid {wanted['uid']!r} is that of the dashboard "
            f"{stored.model.get('title')!r}, which has no tag {TAG!r}, so it is not ours. --force "
            "writes over it"
        )
    if stored.is_provisioned:
        return _keep_provisioned(title, stored, wanted)
    difference = _difference(client, stored, wanted)
    details = str(difference)
    if (stored.meta.get("folderUid") or "") != place.uid:
        was = stored.meta.get("folderTitle") or "General"
        details += f"{'; ' if details else ''}moved from {was}"
    if not details:
        return Step("dashboard", title, "keep")
    return Step("dashboard", title, "update", details, partial(save, stored.model.get("version")))


def _keep_provisioned(title: str, stored: StoredDashboard, wanted: dict[str, Any]) -> Step:
    # A file cannot know the uid of a datasource, and says itself in which folder it is.
    difference = compare_dashboards(stored.model, with_datasource_of(wanted, stored.model))
    if difference:
        file = stored.meta.get("provisionedExternalId") or "a file"
        raise _Kept(
            f"{title}: is provisioned from {file}, so it cannot be saved here. Write the new files "
            f"there with `rayprism dashboards write DIR`. It differs: {difference}"
        )
    return Step("dashboard", title, "keep", "provisioned")


def _difference(
    client: GrafanaClient, stored: StoredDashboard, wanted: dict[str, Any]
) -> Difference:
    """What a push would change; nothing where the last save was one of the same content.

    Grafana 12 and later rewrite a dashboard to the newest schema when it is saved, so what is read
    back is not what was written. Its history tells whether anybody saved it since.
    """
    difference = compare_dashboards(stored.model, wanted)
    if difference:
        last = client.last_message(wanted["uid"]) or ""
        if last.startswith(TAG) and last.endswith(f"({digest_dashboard(wanted)})"):
            return Difference()
    return difference


def _message() -> str:
    return f"rayprism {metadata.version('rayprism')}"


def survey_dashboards(client: GrafanaClient, dashboards: Dashboards) -> list[FoundDashboard]:
    """What of ours is there, and whether it is as it is to be."""
    found = [_survey(client, model) for model in dashboards.values()]
    known = {item.uid for item in found}
    for hit in client.tagged(TAG):
        if hit["uid"] not in known:
            found.append(
                FoundDashboard(
                    uid=hit["uid"],
                    title=hit["title"],
                    state="unknown",
                    folder=hit.get("folderTitle") or "General",
                    url=client.link(str(hit.get("url") or "")),
                )
            )
    return found


def _survey(client: GrafanaClient, model: dict[str, Any]) -> FoundDashboard:
    stored = client.dashboard(model["uid"])
    if stored is None:
        return FoundDashboard(model["uid"], model["title"], "missing")
    place = {
        "folder": stored.meta.get("folderTitle") or "General",
        "url": client.link(str(stored.meta.get("url") or "")),
    }
    if not is_ours(stored.model):
        return FoundDashboard(model["uid"], str(stored.model.get("title")), "foreign", **place)
    # Which datasource is the right one is for a push to say.
    wanted = with_datasource_of(model, stored.model)
    difference = _difference(client, stored, wanted)
    state: Literal["current", "outdated"] = "outdated" if difference else "current"
    return FoundDashboard(model["uid"], model["title"], state, **place, details=str(difference))
