"""The rows of Serve and of HAProxy on the cluster's dashboard."""

from __future__ import annotations

from rayprism.telemetry.dashboards.expressions import rate, select, sum_by
from rayprism.telemetry.dashboards.panels import Color, Panel, Query, docs_link, page_link
from rayprism.telemetry.dashboards.scopes import CLUSTER

__all__ = ["APPLICATION_STATES", "DEPLOYMENT_STATES", "haproxy_panels", "serve_panels"]

_LINKS = (docs_link("of-ray-and-haproxy"), page_link("fleet", "All models"))
_DEPLOYMENT = "cluster, application, deployment"
_PROXY = "cluster, proxy"
_CODE_COLORS = (("2xx", "green"), ("3xx", "blue"), ("4xx", "yellow"), ("5xx", "red"))

APPLICATION_STATES: tuple[Color, ...] = (
    ("UNKNOWN", "text"),
    ("DEPLOY_FAILED", "red"),
    ("UNHEALTHY", "red"),
    ("NOT_STARTED", "yellow"),
    ("DELETING", "purple"),
    ("DEPLOYING", "blue"),
    ("RUNNING", "green"),
)
"""What 0, 1, 2, ... mean in `ray_serve_application_status`.

Source: `ApplicationStatus.to_numeric` of Ray Serve.
"""

DEPLOYMENT_STATES: tuple[Color, ...] = (
    ("UNKNOWN", "text"),
    ("DEPLOY_FAILED", "red"),
    ("UNHEALTHY", "red"),
    ("UPDATING", "blue"),
    ("UPSCALING", "blue"),
    ("DOWNSCALING", "purple"),
    ("HEALTHY", "green"),
)
"""What they mean in `ray_serve_deployment_status`.

Source: `DeploymentStatus.to_numeric` of Ray Serve.
"""


def serve_panels() -> tuple[Panel, ...]:
    """Applications, deployments and their replicas."""
    name = "{{cluster}} {{application}}/{{deployment}}"
    target = select("ray_serve_autoscaling_target_replicas", CLUSTER)
    # Once for each replica: a controller that was restarted has series beside its old ones.
    healthy = (
        f"max by ({_DEPLOYMENT}, replica) "
        f"({select('ray_serve_deployment_replica_healthy', CLUSTER)})"
    )
    processing = select("ray_serve_replica_processing_queries", CLUSTER)
    return (
        Panel(
            title="Serve applications",
            description="The state of each. DEPLOYING for long: replicas find no room, or their "
            "model does not load; `serve status` has the message.",
            unit="none",
            queries=(
                Query(
                    "max by (cluster, application) "
                    f"({select('ray_serve_application_status', CLUSTER)})",
                    "{{cluster}} {{application}}",
                ),
            ),
            links=_LINKS,
            kind="state-timeline",
            width=12,
            colors=APPLICATION_STATES,
        ),
        Panel(
            title="Serve deployments",
            description="The state of each. UPSCALING that does not end: the cluster has no room "
            "for the replicas that are wanted.",
            unit="none",
            queries=(
                Query(
                    f"max by ({_DEPLOYMENT}) ({select('ray_serve_deployment_status', CLUSTER)})",
                    name,
                ),
            ),
            links=_LINKS,
            kind="state-timeline",
            width=12,
            colors=DEPLOYMENT_STATES,
        ),
        Panel(
            title="Replicas wanted and healthy",
            description="What the autoscaler wants, and what passes its health checks. A gap that "
            "stays means no room, or replicas that do not start.",
            unit="none",
            queries=(
                Query(f"max by ({_DEPLOYMENT}) ({target})", f"{name} wanted"),
                Query(sum_by(_DEPLOYMENT, healthy), f"{name} healthy"),
            ),
            links=_LINKS,
            width=12,
            decimals=0,
        ),
        Panel(
            title="Requests in replicas",
            description="Requests that replicas hold now, waiting or running. Rising while the "
            "rate of requests does not: replicas have become slow.",
            unit="none",
            queries=(Query(sum_by(_DEPLOYMENT, processing), name),),
            links=_LINKS,
            width=12,
            decimals=0,
        ),
    )


def _haproxy(name: str) -> str:
    return select(f"haproxy_{name}", CLUSTER)


def haproxy_panels() -> tuple[Panel, ...]:
    """The proxies in front of all applications."""
    proxy = "{{cluster}} {{proxy}}"
    responses = rate(_haproxy("backend_http_responses_total"))
    errors = rate(_haproxy("backend_connection_errors_total"))
    retries = rate(_haproxy("backend_retry_warnings_total"))
    return (
        Panel(
            title="Requests at the proxies",
            description="HTTP and gRPC requests by second at each address. Compare with the "
            "fleet's: a difference is what never reached a replica.",
            unit="reqps",
            queries=(Query(sum_by(_PROXY, rate(_haproxy("frontend_http_requests_total"))), proxy),),
            links=_LINKS,
        ),
        Panel(
            title="Responses by code",
            description="Of all backends. 5xx that the fleet's dashboard does not show come from "
            "HAProxy itself: no replica was there to answer.",
            unit="reqps",
            queries=(Query(sum_by("code", responses), "{{code}}"),),
            links=_LINKS,
            stacked=True,
            colors=_CODE_COLORS,
        ),
        Panel(
            title="Sessions",
            description="Requests in flight to each backend, named `http-` or `grpc-` and the "
            "application.",
            unit="none",
            queries=(Query(sum_by(_PROXY, _haproxy("backend_current_sessions")), proxy),),
            links=_LINKS,
        ),
        Panel(
            title="Queue at the proxies",
            description="Requests that wait in HAProxy for a replica. It should be 0: waiting is "
            "done in the replicas, where batches are made.",
            unit="none",
            queries=(Query(sum_by(_PROXY, _haproxy("backend_current_queue")), proxy),),
            links=_LINKS,
            width=6,
            thresholds=((1.0, "orange"),),
        ),
        Panel(
            title="Connection errors and retries",
            description="By second. Some while a replica goes are normal; steady ones mean that "
            "HAProxy has addresses at which nobody answers.",
            unit="ops",
            queries=(
                Query(sum_by(_PROXY, errors), f"{proxy} errors"),
                Query(sum_by(_PROXY, retries), f"{proxy} retries"),
            ),
            links=_LINKS,
            width=6,
        ),
        Panel(
            title="Servers in use",
            description="Replicas that HAProxy sends requests to. 0: every request to that "
            "application is answered with 503.",
            unit="none",
            queries=(Query(sum_by(_PROXY, _haproxy("backend_active_servers")), proxy),),
            links=_LINKS,
            width=6,
            decimals=0,
        ),
        Panel(
            title="Time at the backends",
            description="Mean of the last 1024 requests, as HAProxy measures it, with the network "
            "and the reading of the body. Far above the fleet's: it is not the model that is slow.",
            unit="s",
            queries=(
                Query(
                    f"max by ({_PROXY}) ({_haproxy('backend_total_time_average_seconds')})", proxy
                ),
            ),
            links=_LINKS,
            width=6,
        ),
    )
