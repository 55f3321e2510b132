"""Every kind of fault in a Serve file: where it is said to be, and in what words."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

import pytest

from rayprism.errors import Fault
from rayprism.fleet.check import CheckReport, check_file

APP = "applications[0]"
MODEL = f"{APP}.deployments[0]"
GRPC = "rayprism.protocol.grpc:add_GRPCInferenceServiceServicer_to_server"

GOOD = f"""\
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, keep_alive_timeout_s: 20, port: 8000}}
grpc_options:
  port: 9000
  grpc_servicer_functions: [{GRPC}]
applications:
- name: front
  route_prefix: /
  import_path: rayprism.serving.front:build
- name: flights
  route_prefix: /v2/models/flights
  import_path: rayprism.serving.app:build
  args: {{model: flights, version: 2}}
  deployments:
  - name: model
    num_replicas: 2
    max_surge_percent: 100
    max_ongoing_requests: 4096
    ray_actor_options: {{num_cpus: 0.5}}
    user_config: {{max_queue_rows: 1024, max_delay_s: 0.002}}
- name: flights-1
  route_prefix: /v2/models/flights/versions/1
  import_path: rayprism.serving.app.build
  args: {{model: flights, version: "1"}}
  deployments:
  - name: model
    autoscaling_config: {{min_replicas: 1, max_replicas: 4, target_ongoing_requests: 32}}
- name: theirs
  route_prefix: /theirs
  import_path: their.module:app
  args: {{anything: 1}}
  deployments:
  - name: Whatever
    num_replicas: auto
"""


@pytest.fixture
def check(tmp_path: Path, repository: Path):
    def run(text: str | bytes, **options: object) -> CheckReport:
        path = tmp_path / "serve.yaml"
        path.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
        return check_file(path, **{"repository": repository, **options})

    return run


def file(
    *,
    top: str = "http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}",
    app: str = "",
    args: str = "args: {model: flights, version: 2}",
    deployment: str = "",
    route: str = "route_prefix: /v2/models/flights",
    path: str = "import_path: rayprism.serving.app:build",
    name: str = "name: model",
) -> str:
    """A file that is good but for what is put in."""
    lines = [line for line in (route, path, args, *app.split("\n")) if line]
    block = indent(f"{name}\n{dedent(deployment)}", "    ").lstrip()
    return (
        f"{top}\napplications:\n- name: one\n"
        + "".join(f"  {line}\n" for line in lines)
        + f"  deployments:\n  - {block}\n"
    )


def test_good_file_has_neither_faults_nor_warnings(check):
    report = check(GOOD)
    assert report.faults == ()
    assert report.warnings == ()
    assert [app.name for app in report.applications] == ["front", "flights", "flights-1", "theirs"]
    flights, older, theirs = report.applications[1:]
    assert (flights.model, flights.version, flights.replicas) == ("flights", "2", "2")
    assert flights.digest.startswith("sha256:")
    assert older.replicas == "1-4"
    assert (theirs.model, theirs.replicas) == ("", "auto")


def test_the_template_of_this_module_is_good(check):
    report = check(file())
    assert report.faults == report.warnings == ()


def test_whatever_ray_offers_is_no_fault(check):
    report = check(
        """\
        proxy_location: EveryNode
        target_capacity: 50
        http_options:
          host: 127.0.0.1
          port: 8000
          root_path: ""
          request_timeout_s: 5
          keep_alive_timeout_s: 20
        grpc_options: {port: 9000, grpc_servicer_functions: ["m:f"], enable_reflection: false}
        controller_options: {runtime_env: {env_vars: {A: "1"}}}
        logging_config: {encoding: JSON, log_level: INFO, enable_access_log: false}
        tracing_config: {exporter_import_path: "m:f", sampling_ratio: 0.5}
        applications:
        - name: one
          route_prefix: null
          import_path: "m:app"
          runtime_env: {env_vars: {A: "1"}, working_dir: "https://example.com/a.zip"}
          args: {on_startup: [1, {a: null}]}
          external_scaler_enabled: false
          logging_config: {log_level: 20}
          deployments:
          - name: A
            num_replicas: auto
            max_ongoing_requests: 10
            max_queued_requests: -1
            backpressure_config: {status_code: 429, retry_after_s: 2}
            user_config: {anything: {num_replica: 1}}
            autoscaling_config:
              min_replicas: 0
              initial_replicas: 1
              max_replicas: 4
              target_ongoing_requests: 1.5
              upscale_delay_s: 3
              downscale_delay_s: 30
              policy: {policy_function: "their_own.module:function", policy_kwargs: {a: 1}}
            graceful_shutdown_wait_loop_s: 2
            graceful_shutdown_timeout_s: 20
            health_check_period_s: 10
            health_check_timeout_s: 30
            ray_actor_options:
              runtime_env: {pip: [numpy]}
              num_cpus: 0.5
              num_gpus: 0.25
              memory: 1000000
              resources: {mine: 1}
              accelerator_type: T4
              label_selector: {region: us}
            max_replicas_per_node: 2
            logging_config: {logs_dir: /tmp/x}
            request_router_config:
              request_router_class: "their_own.module:Router"
              request_router_kwargs: {a: 1}
            rolling_update_percentage: 0.5
            max_surge_percent: 50
          - name: B
            num_replicas: 4
            gang_scheduling_config: {gang_size: 2}
          - name: C
            placement_group_bundles: [{CPU: 1}, {CPU: 1, GPU: 0.5}]
            placement_group_strategy: SPREAD
            placement_group_bundle_label_selector: [{region: us}]
            deployment_actors: [{name: a, actor_class: "their_own.module:Actor"}]
        """
    )
    assert report.faults == ()
    assert report.warnings == ()


# What Ray would refuse, or silently ignore.
RAY = {
    "a list at the top": ("- a\n- b\n", "", "mapping"),
    "a string at the top": ("hello\n", "", "mapping"),
    "no applications": (
        "http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}\n",
        "applications",
        "missing",
    ),
    "empty applications": ("applications: []\n", "applications", "delete every"),
    "applications is a mapping": (
        "applications: {name: one}\n",
        "applications",
        "list",
    ),
    "an application is a string": ("applications: [flights]\n", APP, "mapping"),
    "old format": ("import_path: a:b\nargs: {}\n", "import_path", "old format"),
    "no import path": (file(path=""), f"{APP}.import_path", "missing"),
    "import path without a module": (
        file(path="import_path: nothing"),
        f"{APP}.import_path",
        "dot or colon",
    ),
    "import path with two colons": (
        file(path="import_path: a:b:c"),
        f"{APP}.import_path",
        "one colon",
    ),
    "route without slash": (
        file(route="route_prefix: v2/models/flights"),
        f"{APP}.route_prefix",
        "start with '/'",
    ),
    "route that ends with a slash": (
        file(route="route_prefix: /v2/models/flights/"),
        f"{APP}.route_prefix",
        "end with '/'",
    ),
    "route with a wildcard": (
        file(route='route_prefix: "/v2/models/{name}"'),
        f"{APP}.route_prefix",
        "must not hold",
    ),
    "host of an application": (file(app="host: 127.0.0.1"), f"{APP}.host", "http_options.host"),
    "port of an application": (file(app="port: 8000"), f"{APP}.port", "http_options.port"),
    "args is a list": (file(args="args: [flights]"), f"{APP}.args", "dictionary"),
    "proxy location": (
        file(top="proxy_location: Everywhere\nhttp_options: {host: 127.0.0.1}"),
        "proxy_location",
        "EveryNode",
    ),
    "port is a word": (
        file(top="http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20, port: http}"),
        "http_options.port",
        "integer",
    ),
    "http_options is a list": (file(top="http_options: [8000]"), "http_options", "mapping"),
    "misspelt top key": (
        file(top="http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}\ngrpc_option: {}"),
        "grpc_option",
        "Did you mean 'grpc_options'?",
    ),
    "misspelt http key": (
        file(top="http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20, prot: 8000}"),
        "http_options.prot",
        "Did you mean 'port'?",
    ),
    "misspelt application key": (
        file(app="route_prefx: /x"),
        f"{APP}.route_prefx",
        "Did you mean 'route_prefix'?",
    ),
    "misspelt deployment key": (
        file(deployment="num_replica: 2"),
        f"{MODEL}.num_replica",
        "Did you mean 'num_replicas'?",
    ),
    "misspelt actor option": (
        file(deployment="ray_actor_options: {num_gpu: 1}"),
        f"{MODEL}.ray_actor_options.num_gpu",
        "Did you mean 'num_gpus'?",
    ),
    "misspelt autoscaling key": (
        file(deployment="autoscaling_config: {min_replica: 1}"),
        f"{MODEL}.autoscaling_config.min_replica",
        "Did you mean 'min_replicas'?",
    ),
    "misspelt logging key": (
        file(top="http_options: {host: 127.0.0.1}\nlogging_config: {log_levl: INFO}"),
        "logging_config.log_levl",
        "Did you mean 'log_level'?",
    ),
    "unknown key far from all": (file(app="xyzzy: 1"), f"{APP}.xyzzy", "Allowed: args"),
    "deployment without a name": (file(name="num_replicas: 1"), f"{MODEL}.name", "missing"),
    "deployments is a mapping": (
        file().replace("  - name: model", "    name: model"),
        f"{APP}.deployments",
        "list",
    ),
    "replicas as a string": (file(deployment='num_replicas: "2"'), f"{MODEL}.num_replicas", "int"),
    "no replicas": (file(deployment="num_replicas: 0"), f"{MODEL}.num_replicas", "greater than 0"),
    "replicas is a boolean": (
        file(deployment="num_replicas: true"),
        f"{MODEL}.num_replicas",
        "true is not a number",
    ),
    "replicas and autoscaling": (
        file(deployment="num_replicas: 2\nautoscaling_config: {min_replicas: 1}"),
        f"{MODEL}.num_replicas",
        "autoscaling_config",
    ),
    "autoscaling the wrong way round": (
        file(deployment="autoscaling_config: {min_replicas: 3, max_replicas: 2}"),
        f"{MODEL}.autoscaling_config.max_replicas",
        "greater than or equal",
    ),
    "autoscaling with a negative number": (
        file(deployment="autoscaling_config: {min_replicas: -1}"),
        f"{MODEL}.autoscaling_config.min_replicas",
        "greater than or equal to 0",
    ),
    "surge of 150": (
        file(deployment="max_surge_percent: 150"),
        f"{MODEL}.max_surge_percent",
        "100",
    ),
    "no ongoing requests": (
        file(deployment="max_ongoing_requests: 0"),
        f"{MODEL}.max_ongoing_requests",
        "greater than 0",
    ),
    "ongoing requests is a boolean": (
        file(deployment="max_ongoing_requests: true"),
        f"{MODEL}.max_ongoing_requests",
        "true is not a number",
    ),
    "queued requests": (
        file(deployment="max_queued_requests: -2"),
        f"{MODEL}.max_queued_requests",
        "-1 (no limit)",
    ),
    "negative CPUs": (
        file(deployment="ray_actor_options: {num_cpus: -1}"),
        f"{MODEL}.ray_actor_options.num_cpus",
        "greater than or equal to 0",
    ),
    "local working dir": (
        file(app="runtime_env: {working_dir: ./here}"),
        f"{APP}.runtime_env",
        "remote URIs",
    ),
    "user_config is a list": (
        file(deployment="user_config: [1]"),
        f"{MODEL}.user_config",
        "dictionary",
    ),
    "rolling update over all": (
        file(deployment="rolling_update_percentage: 20"),
        f"{MODEL}.rolling_update_percentage",
        "less than or equal to 1",
    ),
}

# What is wrong with the YAML itself.
YAML = {
    "empty": ("", "", "empty"),
    "only a comment": ("# nothing\n", "", "empty"),
    "not YAML": ("applications: [", "", "not YAML"),
    "tabs": ("applications:\n\t- name: one\n", "", "not YAML"),
    "two documents": ("applications: []\n---\napplications: []\n", "", "second document"),
    "not UTF-8": (b"applications: \xff\xfe\n", "", "UTF-8"),
    "unknown tag": ("applications: !python/object:x {}\n", "", "not YAML"),
    "key twice": (
        file(deployment="num_replicas: 1\nnum_replicas: 2"),
        f"{MODEL}.num_replicas",
        "given twice",
    ),
    "application key twice": (file(app="import_path: a:b"), f"{APP}.import_path", "given twice"),
    "on is a boolean": (file(app="on: 1"), f"{APP}.True", "not a string"),
    "date": (
        file(args="args: {model: flights, version: 2026-01-01}"),
        f"{APP}.args.version",
        "date",
    ),
    "not a number": (
        file(deployment="health_check_period_s: .nan"),
        f"{MODEL}.health_check_period_s",
        "JSON",
    ),
    "alias of itself": ("applications: &a [*a]\n", "", "holds itself"),
    "aliases that explode": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
            for before, name in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "",
        "more than",
    ),
}

# What rayprism would refuse.
OURS = {
    "no args": (file(args=""), f"{APP}.args", "missing"),
    "no model": (file(args="args: {version: 1}"), f"{APP}.args.model", "required"),
    "no version": (file(args="args: {model: flights}"), f"{APP}.args.version", "required"),
    "version latest": (
        file(args="args: {model: flights, version: latest}"),
        f"{APP}.args.version",
        "latest",
    ),
    "version zero": (file(args="args: {model: flights, version: 0}"), f"{APP}.args.version", "1"),
    "version is a float": (
        file(args="args: {model: flights, version: 2.0}"),
        f"{APP}.args.version",
        "whole number",
    ),
    "model name": (file(args="args: {model: a/b, version: 1}"), f"{APP}.args.model", "model name"),
    "misspelt args key": (
        file(args="args: {model: flights, version: 2, alow_code: true}"),
        f"{APP}.args.alow_code",
        "Did you mean 'allow_code'?",
    ),
    "device": (
        file(args="args: {model: flights, version: 2, device: gpu}"),
        f"{APP}.args.device",
        "cuda",
    ),
    "relative repository": (
        file(args="args: {model: flights, version: 2, repository: models}"),
        f"{APP}.args.repository",
        "absolute",
    ),
    "repository that is not there": (
        file(args="args: {model: flights, version: 2, repository: /no/such/folder}"),
        f"{APP}.args.repository",
        "/no/such/folder",
    ),
    "unknown model": (
        file(args="args: {model: flight, version: 2}"),
        f"{APP}.args.model",
        "Did you mean 'flights'?",
    ),
    "unknown version": (
        file(args="args: {model: flights, version: 9}"),
        f"{APP}.args.version",
        "It has: 1, 2",
    ),
    "broken manifest": (
        file(args="args: {model: broken, version: 1}"),
        f"{APP}.args.version",
        "manifest is broken",
    ),
    "file was changed": (
        file(args="args: {model: spoilt, version: 1}"),
        f"{APP}.args.version",
        "model.onnx",
    ),
    "code not allowed": (
        file(args="args: {model: coded, version: 1}"),
        f"{APP}.args.allow_code",
        "allow_code: true",
    ),
    "other deployment name": (file(name="name: Model"), f"{MODEL}.name", "'model'"),
    "deployment twice": (
        file(deployment="num_replicas: 1") + "  - name: model\n",
        f"{APP}.deployments[1].name",
        "twice",
    ),
    "misspelt user_config key": (
        file(deployment="user_config: {max_queue_row: 1}"),
        f"{MODEL}.user_config.max_queue_row",
        "Did you mean 'max_queue_rows'?",
    ),
    "queue of none": (
        file(deployment="user_config: {max_queue_rows: 0}"),
        f"{MODEL}.user_config.max_queue_rows",
        "greater than or equal to 1",
    ),
    "execution": (
        file(deployment="user_config: {execution: fast}"),
        f"{MODEL}.user_config.execution",
        "inline",
    ),
    "default priority over the levels": (
        file(deployment="user_config: {priority_levels: 2, default_priority: 3}"),
        f"{MODEL}.user_config.default_priority",
        "at most",
    ),
    "misspelt import path": (
        file(path="import_path: rayprism.serving.ap:build"),
        f"{APP}.import_path",
        "Did you mean 'rayprism.serving.app:build'?",
    ),
    "misspelt gRPC function": (
        file(
            top="http_options: {host: 127.0.0.1}\ngrpc_options: {grpc_servicer_functions: "
            "['rayprism.protocol.grpc:add_GRPCInferenceService_to_server']}"
        ),
        "grpc_options.grpc_servicer_functions[0]",
        GRPC,
    ),
    "the gRPC function of the stubs": (
        file(
            top="http_options: {host: 127.0.0.1}\ngrpc_options: {grpc_servicer_functions: "
            "['tritonclient.grpc.service_pb2_grpc:add_GRPCInferenceServiceServicer_to_server']}"
        ),
        "grpc_options.grpc_servicer_functions[0]",
        GRPC,
    ),
    "front door with args": (
        file(
            path="import_path: rayprism.serving.front:build",
            route="route_prefix: /",
            name="name: front",
        ),
        f"{APP}.args",
        "takes none",
    ),
    "front door with another deployment": (
        file(path="import_path: rayprism.serving.front:build", route="route_prefix: /", args=""),
        f"{MODEL}.name",
        "'front'",
    ),
}

WARNINGS = {
    "open to all by default": (file(top="{}"), "http_options.host", "no authentication"),
    "connections kept longer than replicas drain": (
        file(top="http_options: {host: 127.0.0.1}"),
        "http_options.keep_alive_timeout_s",
        "not given, so 90",
    ),
    "connections kept as long as replicas drain": (
        file(top="http_options: {host: 127.0.0.1, keep_alive_timeout_s: 30}"),
        "http_options.keep_alive_timeout_s",
        "less than `rayprism up --drain-s`",
    ),
    "open to all": (file(top="http_options: {host: 0.0.0.0}"), "http_options.host", "0.0.0.0"),
    "port as a string": (
        file(top='http_options: {host: localhost, port: "8000"}'),
        "http_options.port",
        "number written as a string",
    ),
    "timeout as a string": (
        file(deployment='graceful_shutdown_timeout_s: "20"'),
        f"{MODEL}.graceful_shutdown_timeout_s",
        "number written as a string",
    ),
    "no route": (file(route="route_prefix: null"), f"{APP}.route_prefix", "no HTTP client"),
    "default route": (file(route=""), f"{APP}.route_prefix", "/v2/models/flights"),
    "another model's route": (
        file(route="route_prefix: /v2/models/delays"),
        f"{APP}.route_prefix",
        "/v2/models/flights",
    ),
    "another version's route": (
        file(route="route_prefix: /v2/models/flights/versions/3"),
        f"{APP}.route_prefix",
        "/v2/models/flights/versions/2",
    ),
    "front door elsewhere": (
        file(
            path="import_path: rayprism.serving.front:build",
            args="",
            route="route_prefix: /front",
            name="name: front",
        ),
        f"{APP}.route_prefix",
        "'/v2'",
    ),
    "few ongoing requests": (
        file(deployment="max_ongoing_requests: 100"),
        f"{MODEL}.max_ongoing_requests",
        "max_queue_rows",
    ),
    "no surge": (file(deployment="max_surge_percent: 0"), f"{MODEL}.max_surge_percent", "before"),
    "logging where it has no effect": (
        file(app="logging_config: {enable_access_log: true}"),
        f"{APP}.logging_config",
        "under its deployment 'model'",
    ),
    "cuda without a GPU": (
        file(args="args: {model: flights, version: 2, device: cuda}"),
        f"{MODEL}.ray_actor_options",
        "num_gpus",
    ),
    "gRPC without functions": (
        file(top="http_options: {host: 127.0.0.1}\ngrpc_options: {port: 9000}"),
        "grpc_options.grpc_servicer_functions",
        GRPC,
    ),
    "gRPC with others only": (
        file(
            top="http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}\n"
            "grpc_options: {grpc_servicer_functions: ['their.grpc:add']}"
        ),
        "grpc_options.grpc_servicer_functions",
        GRPC,
    ),
}


def said(faults: tuple[Fault, ...], path: str, word: str) -> bool:
    return any(fault.path == path and word in fault.message for fault in faults)


@pytest.mark.parametrize("case", [*RAY, *YAML, *OURS])
def test_fault_is_found(check, case):
    text, path, word = {**RAY, **YAML, **OURS}[case]
    report = check(text)
    assert not report.ok
    assert said(report.faults, path, word), [str(fault) for fault in report.faults]


@pytest.mark.parametrize("case", [*RAY, *OURS])
def test_one_mistake_is_one_fault(check, case):
    text, _, _ = {**RAY, **OURS}[case]
    faults = check(text).faults
    assert len(faults) == 1, [str(fault) for fault in faults]


@pytest.mark.parametrize("case", list(WARNINGS))
def test_warning_is_given(check, case):
    text, path, word = WARNINGS[case]
    report = check(text.removeprefix("{}\n"))
    assert report.ok, [str(fault) for fault in report.faults]
    assert said(report.warnings, path, word), [str(fault) for fault in report.warnings]


def test_there_are_enough_cases():
    assert len(RAY) + len(YAML) + len(OURS) >= 60


def test_file_that_is_not_there(tmp_path: Path):
    report = check_file(tmp_path / "none.yaml")
    assert "No such file" in report.faults[0].message


def test_all_faults_are_said_at_once_with_their_lines(check):
    report = check(
        """\
        http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20, prot: 1}
        applications:
        - name: one
          import_path: rayprism.serving.app:build
          route_prefix: one/
          args:
            model: flights
            version: 7
            colour: red
          deployments:
          - name: modle
            num_replicas: "2"
            max_surge_percent: 101
            user_config:
              max_queue_rows: 0
              max_delay_s: 61
        - name: one
          route_prefix: one/
          args: {}
        """
    )
    found = {(fault.line, fault.path) for fault in report.faults}
    assert found == {
        (1, "http_options.prot"),
        (5, "applications[0].route_prefix"),
        (9, "applications[0].args.colour"),
        (11, "applications[0].deployments[0].name"),
        (12, "applications[0].deployments[0].num_replicas"),
        (13, "applications[0].deployments[0].max_surge_percent"),
        (15, "applications[0].deployments[0].user_config.max_queue_rows"),
        (16, "applications[0].deployments[0].user_config.max_delay_s"),
        (17, "applications[1].import_path"),
        (17, "applications[1].name"),
        (18, "applications[1].route_prefix"),
    }
    assert [fault.line for fault in report.faults] == sorted(f.line for f in report.faults)


def test_names_and_routes_that_are_taken(check):
    report = check(
        """\
        http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}
        applications:
        - {name: a, route_prefix: /a, import_path: "m:x"}
        - {name: a, route_prefix: /b, import_path: "m:x"}
        - {name: c, route_prefix: /a, import_path: "m:x"}
        - {import_path: "m:x"}
        - {import_path: "m:x"}
        - {name: g, route_prefix: null, import_path: "m:x"}
        - {name: h, route_prefix: null, import_path: "m:x"}
        """
    )
    assert [(fault.line, fault.path) for fault in report.faults] == [
        (4, "applications[1].name"),
        (5, "applications[2].route_prefix"),
        (7, "applications[4].name"),
        (7, "applications[4].route_prefix"),
    ]


def test_anchors_and_merge_keys_are_followed(check):
    report = check(
        """\
        http_options: {host: 127.0.0.1, keep_alive_timeout_s: 20}
        x-common: &common
          import_path: rayprism.serving.app:build
          deployments:
          - {name: model, num_replicas: 0}
        applications:
        - <<: *common
          name: one
          route_prefix: /v2/models/flights
          args: {model: flights, version: 2}
        """
    )
    found = [(fault.line, fault.path) for fault in report.faults]
    # The fault is in the anchored part; the holder of the anchor is unknown to Ray.
    assert found == [(2, "x-common"), (5, "applications[0].deployments[0].num_replicas")]


def test_yaml_is_read_as_serve_reads_it(check):
    # YAML 1.1: `1e3` is a string, and so no number of replicas; YAML 1.2 would make it 1000.
    report = check(file(deployment="num_replicas: 1e3"))
    assert said(report.faults, f"{MODEL}.num_replicas", "1e3")


def test_digests_are_not_read_where_that_is_not_wanted(check):
    text = file(args="args: {model: spoilt, version: 1}", route="route_prefix: /v2/models/spoilt")
    assert not check(text).ok
    assert check(text, verify=False).ok


def test_without_a_repository_versions_are_not_looked_up(check, monkeypatch):
    monkeypatch.delenv("RAYPRISM_REPOSITORY", raising=False)
    report = check(file(args="args: {model: nobody, version: 1}", route=""), repository=None)
    assert report.ok
    assert said(report.warnings, f"{APP}.args", "--repository")


def test_repository_of_the_environment_and_of_args(check, monkeypatch, repository):
    monkeypatch.setenv("RAYPRISM_REPOSITORY", str(repository))
    assert not check(file(args="args: {model: nobody, version: 1}"), repository=None).ok
    named = f"args: {{model: flights, version: 2, repository: {repository}}}"
    assert check(file(args=named), repository=Path("/nowhere")).ok


def test_allowed_code_is_no_fault(check):
    text = file(
        args="args: {model: coded, version: 1, allow_code: true}",
        route="route_prefix: /v2/models/coded",
    )
    assert check(text).ok


def test_json_report(check):
    report = check(file(deployment="num_replicas: 0")).to_json()
    assert report["ok"] is False
    assert report["faults"][0]["line"] == 9
    assert report["faults"][0]["path"] == f"{MODEL}.num_replicas"
