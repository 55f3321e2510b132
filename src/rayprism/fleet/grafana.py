"""A client for Grafana's HTTP API: what `rayprism dashboards` needs of it, and its errors in words.

The requests are those of the library `grafana-api`. It passes on what `requests` raises and what
Grafana says, which is written for programs; here it becomes what was wrong and how to mend it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprism.fleet.grafana_errors import (
    NEW_TOKEN,
    GrafanaError,
    check_token,
    find_cause,
    parse_url,
    read_refusal,
)

__all__ = ["GrafanaClient", "StoredDashboard"]

_UID = re.compile(r"[A-Za-z0-9_-]{1,40}")
_DASHBOARDS_NEED = "the role Editor, or the permission Edit on the folder"
_FOLDERS_NEED = (
    "the role Editor, or `folders:create`; or make the folder yourself and give the service "
    "account the permission Edit on it"
)
_DATASOURCES_NEED = (
    "the role Admin, or `datasources:create` and `datasources:write`; or use a datasource that is "
    "there, with --datasource NAME instead of --prometheus-url"
)
_READS_NEED = "the role Viewer at least"


@dataclass(frozen=True, slots=True)
class StoredDashboard:
    """A dashboard as Grafana has it.

    Args:
        model: Its JSON.
        meta: What Grafana knows of it: `folderUid`, `url`, `provisioned`, and more.
    """

    model: dict[str, Any]
    meta: dict[str, Any]

    @property
    def is_provisioned(self) -> bool:
        """Whether it comes from a file, and cannot be saved over HTTP."""
        return bool(self.meta.get("provisioned"))


class GrafanaClient:
    """Talks to one Grafana, as one service account.

    Args:
        url: Of Grafana, with its sub-path where it has one.
        token: Of a service account. Is never shown.
        ca_file: Certificates to trust instead of the system's.
        insecure: Trust any certificate.
        timeout_s: Of one request.

    Raises:
        GrafanaError: The URL or the token cannot be one, or the library is not installed.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        ca_file: Path | None = None,
        insecure: bool = False,
        timeout_s: float = 15.0,
    ) -> None:
        parts = parse_url(url)
        check_token(token)
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._token = token
        self._insecure = insecure
        prefix = parts.path.strip("/")
        self._face = _library()(
            token,
            host=parts.netloc,
            url_path_prefix=f"{prefix}/" if prefix else "",
            protocol=parts.scheme,
            verify=not insecure if ca_file is None else str(ca_file),
            timeout=timeout_s,
        )
        # A redirect would make a GET of a POST, and could carry the token to another place.
        self._face.api.s.max_redirects = 0
        self._status = 0
        self._face.api.s.hooks["response"].append(self._note_status)

    def version(self) -> str:
        """Grafana's version; empty where it is set not to tell.

        Raises:
            GrafanaError: It cannot be reached, or what answers is no Grafana.
        """
        try:
            # Without a token this answers too, so what goes wrong here is not the token.
            found = self._ask("tell how it is", lambda: self._face.api.GET("/health"))
        except GrafanaError as error:
            if error.status in (401, 403):
                raise GrafanaError(
                    f"{self.url} answered {error.status} where Grafana needs no token: something "
                    "before it asks for a login of its own. Use an address behind that",
                    error.status,
                ) from None
            if 400 <= error.status < 500:
                raise self._no_grafana(f"answered {error.status}") from None
            raise
        if not isinstance(found, dict) or "database" not in found:
            raise self._no_grafana("answered other JSON than Grafana's")
        return str(found.get("version") or "")

    def organization(self) -> str | None:
        """The name of the organization that the token is of; None where it may not be read.

        Raises:
            GrafanaError: The token is not accepted.
        """
        try:
            found = self._ask(
                "read its organization", self._face.organization.get_current_organization
            )
        except GrafanaError as error:
            if error.status == 403:  # a role of None, with permissions on one folder
                return None
            raise
        return str(found.get("name") or "") or None

    def datasources(self) -> list[dict[str, Any]]:
        """Every datasource that the token may see."""
        listed: list[dict[str, Any]] = self._ask(
            "list datasources", self._face.datasource.list_datasources, "`datasources:read`"
        )
        return listed

    def datasource(self, uid: str) -> dict[str, Any]:
        """One datasource, with all its settings but its secrets."""
        found: dict[str, Any] = self._ask(
            f"read the datasource {uid}",
            lambda: self._face.api.GET(f"/datasources/uid/{uid}"),
            "`datasources:read`",
        )
        return found

    def create_datasource(self, body: Mapping[str, Any]) -> None:
        """Adds a datasource."""
        self._ask(
            f"create the datasource {body['name']!r}",
            lambda: self._face.datasource.create_datasource(dict(body)),
            _DATASOURCES_NEED,
        )

    def update_datasource(self, body: Mapping[str, Any]) -> None:
        """Replaces a datasource's settings. Secrets that are not in `body` stay."""
        # The library knows only the numeric id, which newer Grafanas do not take any more.
        self._ask(
            f"update the datasource {body['name']!r}",
            lambda: self._face.api.PUT(f"/datasources/uid/{body['uid']}", json=dict(body)),
            _DATASOURCES_NEED,
        )

    def find_folder(self, name: str) -> dict[str, Any] | None:
        """The folder of this title, or of this uid; None where the token sees no such."""
        folders = self._ask("list folders", self._face.folder.get_all_folders, _READS_NEED)
        for folder in folders:
            if folder.get("title") == name:
                return dict(folder)
        # Folders inside folders are not in the list.
        if not _UID.fullmatch(name):
            return None
        found = self._find(f"read the folder {name}", lambda: self._face.folder.get_folder(name))
        return None if found is None else dict(found)

    def create_folder(self, title: str) -> str:
        """Adds a folder. Returns its uid."""
        made = self._ask(
            f"create the folder {title!r}",
            lambda: self._face.folder.create_folder(title),
            _FOLDERS_NEED,
        )
        return str(made["uid"])

    def dashboard(self, uid: str) -> StoredDashboard | None:
        """The dashboard of this uid; None where the token sees no such."""
        found = self._find(
            f"read the dashboard {uid}", lambda: self._face.dashboard.get_dashboard(uid)
        )
        if found is None:
            return None
        return StoredDashboard(dict(found["dashboard"]), dict(found.get("meta") or {}))

    def tagged(self, tag: str) -> list[dict[str, Any]]:
        """What a search for dashboards with this tag finds."""
        hits: list[dict[str, Any]] = self._ask(
            "search dashboards",
            lambda: self._face.search.search_dashboards(tag=tag, type_="dash-db"),
            _READS_NEED,
        )
        return hits

    def last_message(self, uid: str) -> str | None:
        """The message of a dashboard's newest version; None where the token may not read it."""
        found = self._find(
            f"read the history of the dashboard {uid}",
            lambda: self._face.api.GET(f"/dashboards/uid/{uid}/versions?limit=1"),
        )
        # Since Grafana 11 the list has a page's token beside it.
        versions = found.get("versions") if isinstance(found, dict) else found
        return str(versions[0].get("message") or "") if versions else None

    def save_dashboard(
        self, model: Mapping[str, Any], folder_uid: str, message: str, *, overwrite: bool = False
    ) -> str:
        """Creates or updates a dashboard.

        Args:
            model: Its JSON. Its `version` is the one that it is a change of; without one, there
                must be no such dashboard yet.
            folder_uid: Where it is to be.
            message: For its history.
            overwrite: Whatever version is there.

        Returns:
            Where to look at it.

        Raises:
            GrafanaError: Somebody else changed it, it is provisioned, or anything else.
        """
        body = {
            "dashboard": {**model, "id": None},
            "folderUid": folder_uid,
            "message": message,
            "overwrite": overwrite,
        }
        doing = f"save the dashboard {model['title']!r}"
        try:
            saved = self._ask(
                doing, lambda: self._face.dashboard.update_dashboard(body), _DASHBOARDS_NEED
            )
        except GrafanaError as error:
            if error.status == 412:
                raise GrafanaError(
                    f"{error}. Somebody saved it since it was read, or another dashboard of "
                    "this folder has its title, or it is there and the token may not see it. "
                    "Run the command again; --force writes over it",
                    412,
                ) from None
            if "provisioned" in str(error):
                raise GrafanaError(
                    f"{error}. It comes from a file of Grafana's provisioning: change it there "
                    "(`rayprism dashboards write DIR`), or set `allowUiUpdates` in its provider",
                    error.status,
                ) from None
            raise
        return self.link(str(saved.get("url") or ""))

    def link(self, path: str) -> str:
        """The address of a page, of the path that Grafana gives, which has its sub-path."""
        return f"{self._origin}{path}"

    def _find(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return self._ask(doing, call, _READS_NEED)
        except GrafanaError as error:
            # To an account with rights on folders only, what does not exist is forbidden too.
            if error.status in (403, 404):
                return None
            raise

    def _ask(self, doing: str, call: Callable[[], Any], needs: str = "") -> Any:
        self._status = 0
        with self._told(doing, needs), warnings.catch_warnings():
            if self._insecure:
                from urllib3.exceptions import InsecureRequestWarning

                # Who says --insecure knows.
                warnings.simplefilter("ignore", InsecureRequestWarning)
            return call()

    @contextmanager
    def _told(self, doing: str, needs: str) -> Iterator[None]:
        """Makes errors for people of what the library raises."""
        from grafana_api.grafana_api import GrafanaException  # type: ignore[import-untyped]
        from requests import exceptions

        try:
            yield
        except GrafanaException as error:
            failed = self._refused(doing, needs, error.status_code, read_refusal(error.response))
        except exceptions.TooManyRedirects as error:
            failed = self._redirected(error.response)
        except exceptions.SSLError as error:
            failed = self._untrusted(find_cause(error))
        except exceptions.Timeout:
            failed = GrafanaError(f"{self.url} did not answer in time, asked to {doing}")
        except exceptions.JSONDecodeError:
            failed = self._no_grafana(f"answered {self._status}, but no JSON")
        except exceptions.ConnectionError as error:
            failed = GrafanaError(
                f"cannot connect to {self.url}: {find_cause(error)}. Is Grafana up, and is it "
                "reached at that address from here? Inside a container, localhost is the container"
            )
        except (exceptions.RequestException, OSError) as error:
            failed = GrafanaError(f"cannot {doing} at {self.url}: {find_cause(error)}")
        except TypeError:
            # The library looks for a message in every refusal, also where it is not an object.
            failed = self._refused(doing, needs, self._status, "no message of Grafana's")
        else:
            return
        # Whoever words an error must not have to think of this.
        shown = str(failed).replace(self._token, "***")
        raise GrafanaError(shown, failed.status) from None

    def _refused(self, doing: str, needs: str, status: int, said: str) -> GrafanaError:
        if "HTTP request to an HTTPS server" in said:
            return GrafanaError(f"{self.url} speaks TLS. Use https:// in --url")
        if status == 401:
            cloud = self._token.startswith("glc_")
            hint = "This is a token of Grafana Cloud's own API, not of Grafana. " if cloud else ""
            return GrafanaError(
                f"{self.url} does not accept the token: {said}. {hint}{NEW_TOKEN}", status
            )
        if status == 403:
            needed = f". It needs {needs}" if needs else ""
            return GrafanaError(f"the token may not {doing}: {said}{needed}", status)
        return GrafanaError(f"{self.url} did not {doing}: {status}, {said}", status)

    def _redirected(self, response: Any) -> GrafanaError:
        location = str(response.headers.get("Location", "")).partition("?")[0]
        base, api, _ = location.rpartition("/api/")
        if api and "://" in base:
            return GrafanaError(f"{self.url} sends on to {base}. Use --url {base}")
        return GrafanaError(
            f"{self.url} sends on to {location}, as a proxy with a login of its own does, or a "
            "Grafana with a sub-path. Use the address at which Grafana itself answers"
        )

    def _untrusted(self, cause: str) -> GrafanaError:
        if "CERTIFICATE_VERIFY_FAILED" in cause:
            return GrafanaError(
                f"the certificate of {self.url} is not trusted: {cause}. Give the certificate of "
                "who signed it with --ca-file FILE, and use the host name that it is for; "
                "--insecure trusts any"
            )
        return GrafanaError(f"no TLS at {self.url}: {cause}. Is it http://?")

    def _no_grafana(self, what: str) -> GrafanaError:
        return GrafanaError(
            f"{self.url} is no Grafana: it {what}. --url is where Grafana itself is, with its "
            "sub-path where it has one (http://host/grafana), and without a page's (/login, /d/...)"
        )

    def _note_status(self, response: Any, *_: Any, **__: Any) -> None:
        self._status = response.status_code


def _library() -> Any:
    try:
        from grafana_api.grafana_face import GrafanaFace  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("grafana_api"):
            raise
        raise GrafanaError(
            "grafana-api is not installed. Install it with `pip install 'rayprism[grafana]'`"
        ) from None
    return GrafanaFace
