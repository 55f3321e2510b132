"""What the models run on: nodes, Ray, Serve, HAProxy, and the scrapes themselves."""

from __future__ import annotations

from rayprism.telemetry.dashboards.cluster_serve import haproxy_panels, serve_panels
from rayprism.telemetry.dashboards.expressions import select, sum_by
from rayprism.telemetry.dashboards.panels import (
    RED_AT_ONE,
    Dashboard,
    Panel,
    Query,
    Row,
    cluster_variable,
    docs_link,
    page_link,
    stat,
)
from rayprism.telemetry.dashboards.scopes import CLUSTER

__all__ = ["cluster_dashboard"]

_LINKS = (docs_link("of-ray-and-haproxy"), page_link("fleet", "All models"))
_SCRAPE_LINKS = (docs_link("how-many-series-fit"), page_link("fleet", "All models"))
_NODE = "cluster, ip"
_GPU = "cluster, ip, GpuIndex"
_NO_GPU = "No node has a GPU"
_PERCENT_STEPS = ((80.0, "orange"), (95.0, "red"))
_SHARE_STEPS = ((0.8, "orange"), (0.95, "red"))


def cluster_dashboard() -> Dashboard:
    """The dashboard of the machines and of what is not the models' own."""
    return Dashboard(
        name="cluster",
        title="rayprism: cluster",
        description="What the models run on. Look here when several models are slow or fail at "
        "once: a node that is full, an application that does not run, a proxy without servers.",
        variables=(cluster_variable("up"),),
        rows=(
            Row("Now", _stats()),
            Row("CPU, memory, disk, network", _nodes()),
            Row("GPUs (empty where there is none)", _gpus()),
            Row("Ray", _ray()),
            Row("Serve", serve_panels()),
            Row("HAProxy", haproxy_panels()),
            Row("Are these metrics whole?", _scrapes()),
        ),
    )


def _node(name: str) -> str:
    return select(f"ray_node_{name}", CLUSTER)


def _by_node(expr: str) -> str:
    return f"max by ({_NODE}) ({expr})"


def _stats() -> tuple[Panel, ...]:
    return (
        stat(
            "Nodes",
            "Nodes that send metrics. Fewer than there should be: one is down or not scraped.",
            "none",
            f"count({_by_node(_node('cpu_count'))}) or vector(0)",
            _LINKS,
            ((0.0, "red"), (1.0, "green")),
        ),
        stat(
            "Busiest CPU",
            "Of the busiest node, as a share of all of its cores.",
            "percent",
            f"max({_node('cpu_utilization')})",
            _LINKS,
            _PERCENT_STEPS,
        ),
        stat(
            "Fullest memory",
            "Of the fullest node. Ray ends workers at 95 %.",
            "percentunit",
            f"max({_node('mem_used')} / {_node('mem_total')})",
            _LINKS,
            _SHARE_STEPS,
        ),
        stat(
            "Not running",
            "Serve applications in any state but RUNNING; see below which ones.",
            "none",
            f"count(max by (cluster, application) "
            f"({select('ray_serve_application_status', CLUSTER)}) != 6) or vector(0)",
            _LINKS,
            ((1.0, "orange"),),
        ),
        stat(
            "Proxy errors",
            "Connections and answers that HAProxy could not get from a replica, by second.",
            "ops",
            "("
            + " + ".join(
                f"sum(rate({select(f'haproxy_backend_{kind}_errors_total', CLUSTER)}"
                "[$__rate_interval]))"
                for kind in ("connection", "response")
            )
            + ") or vector(0)",
            _LINKS,
            ((0.1, "orange"), (1.0, "red")),
        ),
        stat(
            "Targets down",
            "What Prometheus could not scrape: its series are missing in all dashboards.",
            "none",
            f"count({select('up', CLUSTER)} == 0) or vector(0)",
            _SCRAPE_LINKS,
            RED_AT_ONE,
        ),
    )


def _nodes() -> tuple[Panel, ...]:
    name = "{{cluster}} {{ip}}"
    return (
        Panel(
            title="CPU",
            description="Share of a node's cores that is busy. Near 100 % all stages of a request "
            "become slower, not only `compute`.",
            unit="percent",
            maximum=100.0,
            queries=(Query(_by_node(_node("cpu_utilization")), name),),
            links=_LINKS,
            thresholds=_PERCENT_STEPS,
        ),
        Panel(
            title="Memory",
            description="Share of a node's memory, or of its container's, that is used. Ray ends "
            "workers at 95 %: replicas vanish, and batch actors begin anew.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(_by_node(f"{_node('mem_used')} / {_node('mem_total')}"), name),),
            links=_LINKS,
            thresholds=_SHARE_STEPS,
        ),
        Panel(
            title="Memory by component",
            description="Processes with the most memory, of the same name taken together. One that "
            "only rises leaks.",
            unit="bytes",
            queries=(
                Query(
                    "topk(10, "
                    + sum_by("Component", select("ray_component_rss_bytes", CLUSTER))
                    + ")",
                    "{{Component}}",
                ),
            ),
            links=_LINKS,
        ),
        Panel(
            title="Disk",
            description="Share of a node's root file system that is used. Full, the object store "
            "cannot spill, and logs end.",
            unit="percentunit",
            maximum=1.0,
            queries=(
                Query(
                    _by_node(
                        f"{_node('disk_usage')} / ({_node('disk_usage')} + {_node('disk_free')})"
                    ),
                    name,
                ),
            ),
            links=_LINKS,
            width=12,
            thresholds=_SHARE_STEPS,
        ),
        Panel(
            title="Network",
            description="Bytes that a node receives and sends by second. Compare with what its "
            "network can carry.",
            unit="Bps",
            queries=(
                Query(_by_node(_node("network_receive_speed")), f"{name} in"),
                Query(_by_node(_node("network_send_speed")), f"{name} out"),
            ),
            links=_LINKS,
            width=12,
        ),
    )


def _gpus() -> tuple[Panel, ...]:
    used, free = _node("gram_used"), _node("gram_available")
    return (
        Panel(
            title="GPU utilization",
            description="Share of the time in which a GPU ran something; empty where no node has "
            "one. Low under load: batches are too small, or the CPU is what is slow.",
            unit="percent",
            maximum=100.0,
            queries=(
                Query(
                    f"max by ({_GPU}) ({_node('gpus_utilization')})",
                    "{{cluster}} {{ip}} {{GpuIndex}}",
                ),
            ),
            links=_LINKS,
            width=12,
            no_value=_NO_GPU,
        ),
        Panel(
            title="GPU memory",
            description="Share of a GPU's memory that is used; empty where no node has one. Near "
            "100 % the next replica on it does not load.",
            unit="percentunit",
            maximum=1.0,
            queries=(
                Query(
                    f"max by ({_GPU}) ({used} / ({used} + {free}))",
                    "{{cluster}} {{ip}} {{GpuIndex}}",
                ),
            ),
            links=_LINKS,
            width=12,
            thresholds=_SHARE_STEPS,
            no_value=_NO_GPU,
        ),
    )


def _ray() -> tuple[Panel, ...]:
    used = sum_by("cluster", select("ray_object_store_used_memory", CLUSTER))
    free = sum_by("cluster", select("ray_object_store_available_memory", CLUSTER))
    return (
        Panel(
            title="Object store",
            description="Share of the shared memory for objects that is used. Serving needs next "
            "to none; a batch job that fills it spills to disk and becomes slow.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(f"{used} / ({used} + {free})", "{{cluster}}"),),
            links=_LINKS,
            thresholds=_SHARE_STEPS,
        ),
        Panel(
            title="Objects by place",
            description="Bytes of objects in shared memory, on disk in its place, in workers' own "
            "memory, and spilled.",
            unit="bytes",
            queries=(
                Query(
                    sum_by("Location", select("ray_object_store_memory", CLUSTER)), "{{Location}}"
                ),
            ),
            links=_LINKS,
            stacked=True,
        ),
        Panel(
            title="Ray actors",
            description="By state, as Ray's control service has them. `DEAD` that rises and "
            "`RESTARTING` that stays: replicas or batch actors do not live.",
            unit="none",
            queries=(
                Query(sum_by("State", select("ray_actors", CLUSTER, 'Source="gcs"')), "{{State}}"),
            ),
            links=_LINKS,
            decimals=0,
        ),
    )


def _scrapes() -> tuple[Panel, ...]:
    overflow = ",".join(('__name__=~"ray_rayprism_.*"', 'otel_metric_overflow="true"', *CLUSTER))
    return (
        Panel(
            title="Scrapes",
            description="1: Prometheus could read the target's metrics; 0: it could not, and "
            "what that node counts is missing until it can.",
            unit="none",
            maximum=1.0,
            queries=(
                Query(
                    f"max by (cluster, job, instance) ({select('up', CLUSTER)})",
                    "{{cluster}} {{job}} {{instance}}",
                ),
            ),
            links=_SCRAPE_LINKS,
            width=12,
            decimals=0,
        ),
        Panel(
            title="Metrics that overflow",
            description="Metrics with more series on a node than Ray's agent keeps: the rest is "
            "in one series without labels, and versions or models are missing elsewhere.",
            unit="none",
            queries=(Query(f"count by (__name__) ({{{overflow}}})", "{{__name__}}"),),
            links=_SCRAPE_LINKS,
            width=12,
            no_value="None overflows",
        ),
    )
