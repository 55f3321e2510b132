"""A stand-in for Grafana's HTTP API: no Grafana, no database, no rendering.

What it answers, and with which bodies, was read off the sources of Grafana 9 to 12: a dashboard is
kept as it is sent, with `id`, `uid` and `version` added; one that is saved needs the version that
is there, or `overwrite`; a service account of role Viewer may read, Editor also makes folders and
dashboards, Admin also datasources.
"""

from __future__ import annotations

import copy
import http.server
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

VIEWER = "glsa_viewer0000000000000000000000000_0000000a"
EDITOR = "glsa_editor0000000000000000000000000_0000000b"
ADMIN = "glsa_admin00000000000000000000000000_0000000c"
_ROLES = {VIEWER: 1, EDITOR: 2, ADMIN: 3}

Answer = tuple[int, Any]


class _Denied(Exception):
    def __init__(self, status: int, body: Any) -> None:
        self.answer = (status, body)


class GrafanaStandIn:
    """The state of a Grafana, and how it is set up.

    Args:
        sub_path: Where it is served, as `/grafana`.
        migrates: Saves every dashboard rewritten to a newer schema, as Grafana 12 does.
        old_history: Lists versions without a page's token, as up to Grafana 10.
    """

    def __init__(
        self, *, sub_path: str = "", migrates: bool = False, old_history: bool = False
    ) -> None:
        self.sub_path = sub_path
        self.migrates = migrates
        self.old_history = old_history
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.meta: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[str]] = {}
        """The messages of each dashboard's versions, oldest first."""
        self.folders: dict[str, str] = {}
        self.datasources: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.before_save: Callable[[], None] = lambda: None
        """Is called before a dashboard is saved: what others do in the meantime."""
        self.instead: Callable[[str], tuple[int, dict[str, str], str] | None] = lambda _: None
        """What answers in Grafana's place: status, headers and body for a path."""
        self.scheme = "http"
        self.port = 0
        self._ids = iter(range(1, 1_000_000))
        self._routes: list[tuple[str, str, int, str, Callable[..., Answer]]] = [
            ("GET", r"/org", 1, "orgs:read", self._get_org),
            ("GET", r"/folders", 1, "folders:read", self._get_folders),
            ("POST", r"/folders", 2, "folders:create", self._post_folder),
            ("GET", r"/folders/([^/]+)", 1, "folders:read", self._get_folder),
            (
                "POST",
                r"/dashboards/db",
                2,
                "any of dashboards:create, dashboards:write",
                self._save,
            ),
            ("GET", r"/dashboards/uid/([^/]+)", 1, "dashboards:read", self._get_dashboard),
            ("GET", r"/dashboards/uid/([^/]+)/versions", 2, "dashboards:write", self._versions),
            ("GET", r"/search", 1, "dashboards:read", self._search),
            ("GET", r"/datasources", 1, "datasources:read", self._get_datasources),
            ("POST", r"/datasources", 3, "datasources:create", self._post_datasource),
            ("GET", r"/datasources/uid/([^/]+)", 1, "datasources:read", self._get_datasource),
            ("PUT", r"/datasources/uid/([^/]+)", 3, "datasources:write", self._put_datasource),
            ("GET", r"/datasources/name/([^/]+)", 1, "datasources:read", self._get_datasource_name),
        ]

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{self.sub_path}"

    @property
    def writes(self) -> list[tuple[str, str]]:
        """Every request that was to change something."""
        return [request for request in self.requests if request[0] != "GET"]

    def add_datasource(self, name: str, uid: str = "", **settings: Any) -> str:
        """A datasource that somebody made before. Returns its uid."""
        made = {"name": name, "type": "prometheus", "url": "http://elsewhere:9090", **settings}
        _, answer = self._post_datasource({"uid": uid or f"uid-{name}", **made}, {})
        return str(answer["datasource"]["uid"])

    def add_dashboard(self, model: Mapping[str, Any], **meta: Any) -> None:
        """A dashboard that somebody made before."""
        self._keep(copy.deepcopy(dict(model)), "", {"folderUid": "", **meta})

    def edit(self, uid: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Somebody changes a dashboard in a browser, and saves it."""
        model = copy.deepcopy(self.dashboards[uid])
        change(model)
        # What Grafana's frontend puts into whatever it saves.
        model["iteration"] = 1_700_000_000_000
        builtin = {"builtIn": 1, "name": "Annotations & Alerts", "type": "dashboard"}
        model.setdefault("annotations", {}).setdefault("list", []).append(builtin)
        for panel in model.get("panels", []):
            panel["pluginVersion"] = "11.6.0"
        self._keep(model, "", self.meta[uid])

    def answer(
        self, method: str, target: str, token: str | None, body: Any
    ) -> tuple[int, dict[str, str], str]:
        """Answers a request as Grafana does."""
        self.requests.append((method, target))
        parts = urlsplit(target)
        instead = self.instead(parts.path)
        if instead is not None:
            return instead
        prefix = f"{self.sub_path}/api"
        if not parts.path.startswith(f"{prefix}/"):
            found = f"http://127.0.0.1:{self.port}{self.sub_path}{target}"
            if self.sub_path:
                return 301, {"Location": found}, ""
            return 404, {"Content-Type": "text/html"}, "<!doctype html><title>message</title>"
        try:
            status, said = self._route(method, parts.path[len(prefix) :], token, body, parts.query)
        except _Denied as denied:
            status, said = denied.answer
        return status, {"Content-Type": "application/json"}, json.dumps(said)

    def _route(self, method: str, path: str, token: str | None, body: Any, query: str) -> Answer:
        if path == "/health":
            return 200, {"commit": "d2fdff9ee4", "database": "ok", "version": "11.6.0"}
        if token not in _ROLES:
            said = "Unauthorized" if token is None else "Invalid API key"
            id = "auth.unauthorized" if token is None else "api-key.invalid"
            return 401, {"message": said, "messageId": id, "statusCode": 401, "traceID": ""}
        for verb, pattern, role, permission, handler in self._routes:
            match = re.fullmatch(pattern, path)
            if match is None or verb != method:
                continue
            if _ROLES[token] < role:
                needed = f"Permissions needed: {permission}"
                said = f"You'll need additional permissions to perform this action. {needed}"
                id = "ACE0123456789"
                return 403, {"accessErrorId": id, "message": said, "title": "Access denied"}
            return handler(*match.groups(), body, parse_qs(query))
        return 404, {"message": "Not found"}

    def _get_org(self, *_: Any) -> Answer:
        return 200, {"id": 1, "name": "Main Org.", "address": {}}

    def _get_folders(self, *_: Any) -> Answer:
        found = self.folders.items()
        return 200, [{"id": 1, "uid": uid, "title": title} for uid, title in found]

    def _get_folder(self, uid: str, *_: Any) -> Answer:
        if uid not in self.folders:
            return 404, {"message": "folder not found", "status": "not-found"}
        return 200, {"id": 1, "uid": uid, "title": self.folders[uid], "version": 1}

    def _post_folder(self, body: Any, *_: Any) -> Answer:
        uid = body.get("uid") or f"folder{next(self._ids)}"
        self.folders[uid] = body["title"]
        return 200, {"id": 1, "uid": uid, "title": body["title"], "version": 1}

    def _get_dashboard(self, uid: str, *_: Any) -> Answer:
        if uid not in self.dashboards:
            return 404, {"message": "Dashboard not found", "messageId": "dashboards.not-found"}
        return 200, {"dashboard": self.dashboards[uid], "meta": self.meta[uid]}

    def _versions(self, uid: str, _: Any, query: Mapping[str, list[str]]) -> Answer:
        messages = self.history.get(uid, [])
        versions = [
            {"version": number, "message": message, "uid": uid}
            for number, message in enumerate(messages, 1)
        ][::-1]
        versions = versions[: int(query.get("limit", ["1000"])[0])]
        return 200, versions if self.old_history else {"continueToken": "", "versions": versions}

    def _save(self, body: Any, *_: Any) -> Answer:
        self.before_save()
        model, uid = body["dashboard"], body["dashboard"]["uid"]
        if body["folderUid"] and body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        if uid in self.dashboards:
            if self.meta[uid].get("provisioned"):
                return 400, {"message": "Cannot save provisioned dashboard"}
            version = self.dashboards[uid]["version"]
            if model.get("version", 0) != version and not body.get("overwrite"):
                said = "The dashboard has been changed by someone else"
                return 412, {"message": said, "status": "version-mismatch"}
        self._keep(model, body.get("message", ""), {"folderUid": body["folderUid"]})
        saved = self.dashboards[uid]
        return 200, {
            "status": "success",
            "id": saved["id"],
            "uid": uid,
            "version": saved["version"],
            "url": self.meta[uid]["url"],
            "folderUid": body["folderUid"],
        }

    def _keep(self, model: dict[str, Any], message: str, meta: Mapping[str, Any]) -> None:
        uid = model["uid"]
        before = self.dashboards.get(uid, {})
        model["id"] = before.get("id") or next(self._ids)
        model["version"] = before.get("version", 0) + 1
        if self.migrates:
            model["schemaVersion"] = 42
            for panel in model.get("panels", []):
                panel["transparent"] = False
        self.dashboards[uid] = model
        slug = re.sub(r"\W+", "-", model["title"].lower())
        self.meta[uid] = {
            "type": "db",
            "folderTitle": self.folders.get(meta["folderUid"], "General"),
            "provisioned": False,
            **meta,
            "slug": slug,
            "url": f"{self.sub_path}/d/{uid}/{slug}",
            "version": model["version"],
        }
        self.history.setdefault(uid, []).append(message)

    def _search(self, _: Any, query: Mapping[str, list[str]]) -> Answer:
        hits = []
        for uid, model in self.dashboards.items():
            if set(query.get("tag", [])) <= set(model.get("tags", [])):
                meta = self.meta[uid]
                folder = {key: meta[key] for key in ("folderUid", "folderTitle")}
                hit = {"uid": uid, "title": model["title"], "url": meta["url"], "type": "dash-db"}
                hits.append({**hit, **(folder if meta["folderUid"] else {})})
        return 200, hits

    def _get_datasources(self, *_: Any) -> Answer:
        return 200, list(self.datasources.values())

    def _get_datasource(self, uid: str, *_: Any) -> Answer:
        if uid not in self.datasources:
            return 404, {"message": "Data source not found"}
        return 200, self.datasources[uid]

    def _get_datasource_name(self, name: str, *_: Any) -> Answer:
        for source in self.datasources.values():
            if source["name"] == name:
                return 200, source
        return 404, {"message": "Data source not found"}

    def _post_datasource(self, body: Any, *_: Any) -> Answer:
        if any(source["name"] == body["name"] for source in self.datasources.values()):
            return 409, {"message": "data source with the same name already exists"}
        made = {"isDefault": False, "readOnly": False, "basicAuth": False, "jsonData": {}, **body}
        self.datasources[body["uid"]] = {**made, "id": next(self._ids), "orgId": 1, "version": 1}
        return 200, {"message": "Datasource added", "datasource": self.datasources[body["uid"]]}

    def _put_datasource(self, uid: str, body: Any, *_: Any) -> Answer:
        stored = self.datasources[uid]
        if stored["readOnly"]:
            return 403, {"message": "Cannot update read-only data source"}
        self.datasources[uid] = {**body, "id": stored["id"], "version": stored["version"] + 1}
        return 200, {"message": "Datasource updated", "datasource": self.datasources[uid]}


@contextmanager
def serving(
    stand_in: GrafanaStandIn, tls: ssl.SSLContext | None = None
) -> Iterator[GrafanaStandIn]:
    """Answers HTTP on a free port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind, _, token = self.headers.get("Authorization", "").partition(" ")
            status, headers, text = stand_in.answer(
                self.command,
                self.path,
                token if kind == "Bearer" else None,
                json.loads(body) if body else None,
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None:
            """Clients that go away, as those that trust no certificate, are no fault here."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
            stand_in.scheme = "https"
        stand_in.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
