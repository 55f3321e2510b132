"""Dashboards in a Grafana: what is written, what is left alone, and errors, against a stand-in."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rayprism.errors import ConfigInvalid, SetupError
from rayprism.fleet.dashboard_changes import compare_dashboards, digest_dashboard
from rayprism.fleet.dashboards import (
    DATASOURCE_UID,
    PushSettings,
    load_dashboards,
    plan_push,
    survey_dashboards,
    write_dashboards,
)
from rayprism.fleet.grafana import GrafanaClient
from rayprism.fleet.grafana_errors import GrafanaError
from tests.support.grafana import ADMIN, EDITOR, VIEWER, GrafanaStandIn, serving

PROMETHEUS = PushSettings(prometheus_url="http://prometheus:9090")


def panel(title: str, expression: str = "up", y: int = 0) -> dict[str, Any]:
    return {
        "id": len(title),
        "type": "timeseries",
        "title": title,
        "gridPos": {"x": 0, "y": y, "w": 24, "h": 8},
        "targets": [{"refId": "A", "expr": expression}],
    }


def dashboard(name: str, *panels: dict[str, Any]) -> dict[str, Any]:
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}}
    return {
        "uid": f"rayprism-{name}",
        "title": name.title(),
        "tags": ["rayprism"],
        "schemaVersion": 41,
        "templating": {"list": [variable]},
        "panels": list(panels) or [panel("Requests"), panel("Errors", y=8)],
    }


@pytest.fixture
def models() -> dict[str, dict[str, Any]]:
    return {"fleet": dashboard("fleet"), "model": dashboard("model")}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def grafana() -> Iterator[GrafanaStandIn]:
    with serving(GrafanaStandIn()) as stand_in:
        yield stand_in


Models = dict[str, dict[str, Any]]


def push(
    grafana: GrafanaStandIn,
    models: Models,
    settings: PushSettings = PROMETHEUS,
    token: str = ADMIN,
) -> dict[str, tuple[str, str]]:
    """What was done with each, and how."""
    steps = plan_push(GrafanaClient(grafana.url, token), models, settings)
    for step in steps:
        step.write()
    return {step.name: (step.action, step.details) for step in steps}


def test_the_first_push_makes_everything(grafana, models):
    assert push(grafana, models) == {
        "rayprism Prometheus": ("create", "http://prometheus:9090"),
        "rayprism": ("create", ""),
        "Fleet": ("create", ""),
        "Model": ("create", ""),
    }
    source = grafana.datasources[DATASOURCE_UID]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == "10s"
    assert not source["isDefault"]
    (folder,) = grafana.folders
    assert {meta["folderUid"] for meta in grafana.meta.values()} == {folder}
    stored = grafana.dashboards["rayprism-fleet"]
    assert stored["panels"] == models["fleet"]["panels"]
    assert stored["templating"]["list"][0]["current"] == {
        "text": "rayprism Prometheus",
        "value": DATASOURCE_UID,
    }
    assert models["fleet"]["templating"]["list"][0]["current"] == {}
    message = grafana.history["rayprism-fleet"][0]
    assert message.startswith("rayprism ")
    assert message.endswith(f"({digest_dashboard(stored)})")


@pytest.mark.parametrize("token", [VIEWER, EDITOR, ADMIN])
def test_the_second_push_writes_nothing(grafana, models, token):
    push(grafana, models)
    grafana.requests.clear()
    done = push(grafana, models, token=token)
    assert set(done.values()) == {("keep", "")}
    assert grafana.requests
    assert grafana.writes == []


def test_only_what_differs_is_written(grafana, models):
    push(grafana, models)
    grafana.requests.clear()
    models["fleet"] = dashboard(
        "fleet", panel("Requests", "sum(up)"), panel("Latency", y=8), panel("Queue", y=16)
    )
    done = push(grafana, models)
    assert done["Fleet"] == ("update", "added Latency, Queue; removed Errors; changed Requests")
    assert done["Model"] == ("keep", "")
    assert grafana.writes == [("POST", "/api/dashboards/db")]
    assert grafana.dashboards["rayprism-fleet"]["version"] == 2
    assert len(grafana.history["rayprism-fleet"]) == 2


def test_changes_by_hand_are_taken_back(grafana, models):
    push(grafana, models)
    grafana.edit("rayprism-fleet", lambda model: model["panels"][0].update(title="Mine"))
    done = push(grafana, models)
    assert done["Fleet"] == ("update", "added Requests; removed Mine")
    assert grafana.dashboards["rayprism-fleet"]["panels"] == models["fleet"]["panels"]


def test_a_save_without_changes_is_no_change(grafana, models):
    push(grafana, models)
    grafana.edit("rayprism-fleet", lambda model: None)
    grafana.requests.clear()
    assert push(grafana, models)["Fleet"] == ("keep", "")
    assert grafana.writes == []


@pytest.mark.parametrize("old_history", [False, True])
def test_a_grafana_that_rewrites_what_is_saved(models, old_history):
    with serving(GrafanaStandIn(migrates=True, old_history=old_history)) as grafana:
        push(grafana, models)
        grafana.requests.clear()
        assert push(grafana, models)["Fleet"] == ("keep", "")
        assert grafana.writes == []
        # Another content, and the same one after somebody else's save, are written.
        models["model"]["panels"][0]["targets"][0]["expr"] = "sum(up)"
        grafana.edit("rayprism-fleet", lambda model: model["panels"].pop())
        done = push(grafana, models)
        assert done["Fleet"][0] == done["Model"][0] == "update"


def test_a_plan_alone_writes_nothing(grafana, models):
    steps = plan_push(GrafanaClient(grafana.url, ADMIN), models, PROMETHEUS)
    assert [step.action for step in steps] == ["create"] * 4
    assert grafana.writes == []


def test_a_dashboard_that_is_not_ours_is_left_alone(grafana, models):
    theirs = {**dashboard("model"), "title": "Theirs", "tags": ["sales"]}
    grafana.add_dashboard(theirs)
    with pytest.raises(GrafanaError, match=r"'rayprism-model' .* 'Theirs'.*not ours. --force"):
        push(grafana, models)
    assert grafana.writes == []
    forced = PushSettings(prometheus_url="http://prometheus:9090", force=True)
    assert push(grafana, models, forced)["Model"][0] == "update"
    assert grafana.dashboards["rayprism-model"]["title"] == "Model"


def test_somebody_saves_at_the_same_time(grafana, models):
    push(grafana, models)
    models["fleet"]["title"] = "The fleet"

    def edit() -> None:
        grafana.before_save = lambda: None
        grafana.edit("rayprism-fleet", lambda model: model.update(title="Other"))

    grafana.before_save = edit
    with pytest.raises(GrafanaError, match=r"412, The dashboard has been changed .*Run .* again"):
        push(grafana, models)
    assert grafana.dashboards["rayprism-fleet"]["title"] == "Other"
    assert push(grafana, models)["The fleet"][0] == "update"


def test_a_dashboard_that_the_token_does_not_see_is_not_written_over(grafana, models):
    push(grafana, models)
    hidden = "/api/dashboards/uid/rayprism-fleet"
    denied = (403, {}, json.dumps({"message": "no"}))
    grafana.instead = lambda path: denied if path == hidden else None
    models["fleet"]["title"] = "The fleet"
    with pytest.raises(GrafanaError, match="the token may not see it"):
        push(grafana, models)
    assert grafana.dashboards["rayprism-fleet"]["title"] == "Fleet"


def test_provisioned_dashboards(grafana, models):
    for model in models.values():
        grafana.add_dashboard(model, provisioned=True, provisionedExternalId="fleet.json")
    done = push(grafana, models)
    assert done["Fleet"] == ("keep", "provisioned")
    models["fleet"] = dashboard("fleet", panel("Other"))
    grafana.requests.clear()
    with pytest.raises(GrafanaError, match=r"provisioned from fleet\.json.*added Other"):
        push(grafana, models)
    assert grafana.writes == []


def test_provisioned_while_it_is_pushed(grafana, models):
    push(grafana, models)
    grafana.before_save = lambda: grafana.meta["rayprism-fleet"].update(provisioned=True)
    models["fleet"] = dashboard("fleet", panel("Other"))
    with pytest.raises(GrafanaError, match=r"Cannot save provisioned dashboard\. .*allowUiUpdates"):
        push(grafana, models)


def test_the_folder(grafana, models):
    grafana.folders.update(ml="Machine learning", ops="Operations")
    push(grafana, models, PushSettings("Machine learning", prometheus_url="http://p:9090"))
    done = push(grafana, models, PushSettings("ops"))
    assert done["Operations"] == ("keep", "")
    assert done["Fleet"] == ("update", "moved from Machine learning")
    assert grafana.meta["rayprism-fleet"]["folderUid"] == "ops"
    done = push(grafana, models, PushSettings("new"))
    assert done["new"] == ("create", "")
    assert set(grafana.folders.values()) == {"Machine learning", "Operations", "new"}


def test_dashboards_of_the_root_are_moved_to_a_new_folder(grafana, models):
    grafana.add_datasource("Prometheus", "prom")
    grafana.add_dashboard(models["fleet"])
    done = push(grafana, models, PushSettings())
    assert done["Fleet"][0] == "update"
    assert done["Fleet"][1].endswith("moved from General")
    assert grafana.meta["rayprism-fleet"]["folderUid"]


def chosen(grafana: GrafanaStandIn, models: Models, **settings: Any) -> str:
    push(grafana, models, PushSettings(**settings), token=EDITOR)
    return str(grafana.dashboards["rayprism-fleet"]["templating"]["list"][0]["current"]["value"])


def test_which_datasource(grafana, models):
    with pytest.raises(GrafanaError, match="has no Prometheus datasource"):
        chosen(grafana, models)
    grafana.add_datasource("Loki", type="loki", isDefault=True)
    grafana.add_datasource("One", "one")
    assert chosen(grafana, models) == "one"
    grafana.add_datasource("Two", "two")
    with pytest.raises(GrafanaError, match=r"more than one Prometheus .*'One', 'Two'"):
        chosen(grafana, models)
    assert chosen(grafana, models, datasource="Two") == "two"
    assert chosen(grafana, models, datasource="one") == "one"
    grafana.add_datasource("Three", "three", isDefault=True)
    assert chosen(grafana, models) == "three"
    grafana.add_datasource("Ours", DATASOURCE_UID)
    assert chosen(grafana, models) == DATASOURCE_UID
    with pytest.raises(
        GrafanaError, match=r"no Prometheus datasource is named 'Loki'\. There are:"
    ):
        chosen(grafana, models, datasource="Loki")


def test_our_datasource_follows_its_url_and_keeps_what_was_added(grafana, models):
    push(grafana, models)
    source = grafana.datasources[DATASOURCE_UID]
    source["jsonData"]["tlsSkipVerify"] = True
    source["basicAuth"] = True
    done = push(grafana, models, PushSettings(prometheus_url="http://other:9090"))
    assert done["rayprism Prometheus"] == (
        "update",
        "changed url: http://prometheus:9090 -> http://other:9090",
    )
    source = grafana.datasources[DATASOURCE_UID]
    assert source["url"] == "http://other:9090"
    assert source["basicAuth"] is True
    assert source["jsonData"]["tlsSkipVerify"] is True
    source["readOnly"] = True
    with pytest.raises(GrafanaError, match=r"is provisioned from a file.*http://other:9090"):
        push(grafana, models)


def test_a_name_that_is_taken_is_told(grafana, models):
    grafana.add_datasource("rayprism Prometheus")
    with pytest.raises(GrafanaError, match="409, data source with the same name already exists"):
        push(grafana, models)


def test_what_a_token_may_not_do_says_what_it_needs(grafana, models):
    with pytest.raises(GrafanaError, match=r"datasources:create\. It needs the role Admin.*--dat"):
        push(grafana, models, token=EDITOR)
    grafana.add_datasource("Prometheus")
    with pytest.raises(GrafanaError, match=r"folders:create\. It needs the role Editor"):
        push(grafana, models, PushSettings(), token=VIEWER)
    grafana.folders["f"] = "rayprism"
    with pytest.raises(GrafanaError, match=r"save the dashboard 'Fleet': .*needs the role Editor"):
        push(grafana, models, PushSettings(), token=VIEWER)
    assert grafana.dashboards == {}


def test_a_role_that_may_not_read_the_organization(grafana):
    grafana.instead = lambda path: (403, {}, "{}") if path == "/api/org" else None
    assert GrafanaClient(grafana.url, EDITOR).organization() is None


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("glsa_wrong", r"does not accept the token: Invalid API key\. In Grafana: Administration"),
        ("glc_wrong", "a token of Grafana Cloud's own API"),
    ],
)
def test_a_token_that_is_not_accepted(grafana, token, said):
    client = GrafanaClient(grafana.url, token)
    assert client.version() == "11.6.0"
    with pytest.raises(GrafanaError, match=said) as caught:
        client.organization()
    assert token not in str(caught.value)


@pytest.mark.parametrize("token", ["two words", "two\nlines", "ümlaut"])
def test_what_cannot_be_a_token(token):
    with pytest.raises(GrafanaError, match="signs that no token has") as caught:
        GrafanaClient("http://127.0.0.1:1", token)
    assert token not in str(caught.value)


def test_no_token():
    with pytest.raises(GrafanaError, match=r"no token\. Set GRAFANA_TOKEN, or use --token-file"):
        GrafanaClient("http://127.0.0.1:1", "")


def test_no_error_and_no_log_shows_the_token(grafana, models, caplog):
    caplog.set_level(logging.DEBUG)
    push(grafana, models)
    echo = json.dumps({"message": f"bad: {ADMIN}"})
    grafana.instead = lambda path: (500, {}, echo)
    with pytest.raises(GrafanaError, match=r"500, bad: \*\*\*"):
        push(grafana, models)
    assert "urllib3" in {record.name.partition(".")[0] for record in caplog.records}
    assert ADMIN not in caplog.text


@pytest.mark.parametrize(
    "url", ["grafana:3000", "ftp://grafana", "http://", "http://a:b", "http://[::1"]
)
def test_what_is_no_url(url):
    with pytest.raises(GrafanaError, match="--url is not an HTTP URL"):
        GrafanaClient(url, ADMIN)


def test_a_password_in_the_url_is_refused_and_not_shown():
    with pytest.raises(GrafanaError, match="holds a user or a password") as caught:
        GrafanaClient("http://admin:secret@127.0.0.1:1", ADMIN)
    assert "secret" not in str(caught.value)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_nobody_answers():
    client = GrafanaClient(f"http://127.0.0.1:{free_port()}", ADMIN)
    with pytest.raises(GrafanaError, match=r"cannot connect to .*: Connection refused\. Is Graf"):
        client.version()


def test_no_answer_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = GrafanaClient(url, ADMIN, timeout_s=0.05)
        with pytest.raises(GrafanaError, match="did not answer in time"):
            client.version()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {}, "<html>no message</html>"), "is no Grafana: it answered 404"),
        ((404, {}, "[]"), "is no Grafana: it answered 404"),
        ((404, {}, "null"), "is no Grafana: it answered 404"),
        ((200, {}, "<html>"), "is no Grafana: it answered 200, but no JSON"),
        ((200, {}, '{"status": "success"}'), "is no Grafana: it answered other JSON"),
        ((200, {}, "[]"), "is no Grafana: it answered other JSON"),
        ((401, {}, "<html>login</html>"), "something before it asks for a login"),
        ((503, {}, '{"database": "failing"}'), "503, .*failing"),
        ((302, {"Location": "https://sso.example/login?to=x"}, ""), "sends on to https://sso.e"),
        ((301, {"Location": "https://g.example/api/health"}, ""), "Use --url https://g.example"),
        ((302, {"Location": "/login"}, ""), "sends on to /login, as a proxy"),
        (
            (400, {}, "Client sent an HTTP request to an HTTPS server."),
            "speaks TLS. Use https:// in --url",
        ),
    ],
)
def test_what_is_not_a_grafana(grafana, answer, said):
    grafana.instead = lambda path: answer
    with pytest.raises(GrafanaError, match=said):
        GrafanaClient(grafana.url, ADMIN).version()
    assert len(grafana.requests) == 1


def test_a_page_is_not_the_url(grafana):
    with pytest.raises(GrafanaError, match=r"is no Grafana.*without a page's"):
        GrafanaClient(f"{grafana.url}/d/rayprism-fleet", ADMIN).version()


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_sub_path(models, slash):
    with serving(GrafanaStandIn(sub_path="/grafana")) as grafana:
        client = GrafanaClient(f"{grafana.url}{slash}", ADMIN)
        assert client.version() == "11.6.0"
        for step in plan_push(client, models, PROMETHEUS):
            step.write()
        found = survey_dashboards(client, models)
        assert found[0].url == f"{grafana.url}/d/rayprism-fleet/fleet"
        without = grafana.url.removesuffix("/grafana")
        with pytest.raises(GrafanaError, match=f"Use --url {grafana.url}$"):
            GrafanaClient(without, ADMIN).version()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Self-signed for 127.0.0.1: the certificate and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    import ipaddress

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "grafana")])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"


def test_tls(certificate, models):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    with serving(GrafanaStandIn(), tls) as grafana:
        with pytest.raises(GrafanaError, match=r"not trusted: .*self-signed.*--ca-file FILE"):
            GrafanaClient(grafana.url, ADMIN).version()
        trusting = GrafanaClient(grafana.url, ADMIN, ca_file=certificate[0])
        assert trusting.version() == "11.6.0"
        # Warnings are errors in these tests, and the library would warn at every request.
        assert GrafanaClient(grafana.url, ADMIN, insecure=True).organization() == "Main Org."


def test_tls_where_there_is_none(grafana):
    client = GrafanaClient(grafana.url.replace("http://", "https://"), ADMIN)
    with pytest.raises(GrafanaError, match=r"no TLS at .* Is it http://\?"):
        client.version()


def test_survey(grafana, models):
    push(grafana, models)
    models["fleet"]["panels"][0]["targets"][0]["expr"] = "sum(up)"
    models["batch"] = dashboard("batch")
    models["cluster"] = dashboard("cluster")
    grafana.add_dashboard({**dashboard("cluster"), "tags": []})
    grafana.add_dashboard({**dashboard("older"), "title": "Older"})
    found = survey_dashboards(GrafanaClient(grafana.url, VIEWER), models)
    states = {item.uid.removeprefix("rayprism-"): item.state for item in found}
    assert states == {
        "fleet": "outdated",
        "model": "current",
        "batch": "missing",
        "cluster": "foreign",
        "older": "unknown",
    }
    assert found[0].details == "changed Requests"
    assert [item.folder for item in found] == ["rayprism", "rayprism", "", "General", "General"]


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: None, ""),
        (lambda model: model.update(id=7, version=9, iteration=1, schemaVersion=42), ""),
        (lambda model: model.update(links=[], description=None), ""),
        (lambda model: model["panels"][0].update(pluginVersion="11.0.0"), ""),
        (lambda model: model["panels"][0].update(description="mine"), "changed Requests"),
        (lambda model: model["panels"][0]["gridPos"].update(y=100), "settings layout"),
        (lambda model: model["panels"].reverse(), "settings layout"),
        (lambda model: model.update(refresh="5s", title="T"), "settings refresh, title"),
        (lambda model: model["panels"].append(panel("Errors")), "removed Errors (2)"),
        (
            lambda model: model["panels"].append({"type": "row", "panels": [panel("Deep")]}),
            "removed row without a title, Deep",
        ),
        (lambda model: model["panels"].clear(), "added Requests, Errors"),
        (
            lambda model: model["panels"].extend(panel(f"P{i}") for i in range(7)),
            "removed P0, P1, P2, P3, P4 and 2 more",
        ),
    ],
)
def test_what_is_a_difference(change: Change, said: str):
    wanted = dashboard("fleet")
    there = copy.deepcopy(wanted)
    change(there)
    assert str(compare_dashboards(there, wanted)) == said
    assert (digest_dashboard(there) == digest_dashboard(wanted)) == (not said)


def test_files(tmp_path, models):
    written = write_dashboards(models, tmp_path / "new")
    assert [path.name for path in written] == ["fleet.json", "model.json"]
    assert load_dashboards(tmp_path / "new") == models
    models["fleet"]["title"] = "Flotte für alle"
    assert write_dashboards(models, tmp_path / "new") == [tmp_path / "new" / "fleet.json"]
    assert "für" in (tmp_path / "new" / "fleet.json").read_text(encoding="utf-8")


def test_files_that_are_not_dashboards(tmp_path, models):
    with pytest.raises(SetupError, match=r"has no \.json files. `rayprism dashboards write"):
        load_dashboards(tmp_path)
    write_dashboards(models, tmp_path)
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_text('{"uid": "x", "title": "X"}')
    (tmp_path / "d.json").write_text('{"uid": "x/y", "title": "X", "tags": ["rayprism"]}')
    (tmp_path / "z.json").write_text((tmp_path / "fleet.json").read_text())
    with pytest.raises(ConfigInvalid) as caught:
        load_dashboards(tmp_path)
    assert [fault.path for fault in caught.value.faults] == [f"{c}.json" for c in "abcdz"]


@pytest.mark.skipif(
    importlib.util.find_spec("grafana_foundation_sdk") is None, reason="needs rayprism[grafana]"
)
def test_our_own_dashboards(grafana, tmp_path):
    ours = load_dashboards()
    write_dashboards(ours, tmp_path)
    assert load_dashboards(tmp_path) == ours
    push(grafana, ours)
    for uid in grafana.dashboards:
        grafana.edit(uid, lambda model: None)
    grafana.requests.clear()
    assert {action for action, _ in push(grafana, ours).values()} == {"keep"}
    assert grafana.writes == []
    for model in grafana.dashboards.values():
        names = {item["name"]: item for item in model["templating"]["list"]}
        assert names["datasource"]["current"]["value"] == DATASOURCE_UID
