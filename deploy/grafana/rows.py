"""What Grafana's dashboard shows: rows of panels, and what each asks Prometheus. `dashboard.py` writes it down.

`python -m integration.panels` asks a real Prometheus every query and draws what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

S = 'instance=~"$instance"'
A = S + ',adapter=~"$adapter"'
WINDOW = "[$__rate_interval]"
GREEN, ORANGE, RED, BLUE, YELLOW, GREY = "green", "orange", "red", "blue", "yellow", "#8e8e8e"
FIRING = f'alertname=~"Perft.*",alertstate="firing",{S}'
OUR_FAULT = 'finish_reason=~"error|adapter_output_invalid|adapter_unavailable|engine_unavailable|device_full"'
ENDED_WELL = "stop|length|tool_calls|content_filter|repetition|abort"


@dataclass(frozen=True)
class Query:
    """What a panel asks. legend: of its series. column: of a table."""

    expr: str
    legend: str = ""
    column: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel, without its place. steps: thresholds as (from, colour); the first one's `from` is ignored.

    colors: by the name of a series. units: by the column of a table, as (unit, decimals or None).
    """

    type: str
    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    steps: Sequence[tuple[float, str]] = ((0, BLUE),)
    stack: str = "none"
    bars: bool = False
    maximum: float | None = None
    lines_at_steps: bool = False
    colors: dict[str, str] = field(default_factory=dict)
    mappings: dict[str, tuple[str, str]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    link: str = ""


# Queries


def total(metric: str, labels: str = S) -> str:
    return f"sum({metric}{{{labels}}})"


def by(label: str, metric: str, labels: str = S) -> str:
    return f"sum by ({label}) ({metric}{{{labels}}})"


def rate(metric: str, label: str = "", labels: str = S) -> str:
    over = f" by ({label}) " if label else ""
    return f"sum{over}(rate({metric}{{{labels}}}{WINDOW}))"


def quantile(q: float, metric: str, label: str = "", labels: str = S) -> str:
    over = f"{label}, le" if label else "le"
    return f"histogram_quantile({q}, sum by ({over}) (rate({metric}_bucket{{{labels}}}{WINDOW})))"


def mean(metric: str) -> str:
    """Of a histogram, by server."""
    return f"{rate(metric + '_sum', 'instance')} / {rate(metric + '_count', 'instance')}"


def quantiles(metric: str) -> list[Query]:
    return [Query(quantile(q, metric), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]


def top(expr: str) -> str:
    return f"topk($top, {expr})"


BUSIEST = top(rate("perft_adapter_requests_total", "adapter", A))


def of_busiest(expr: str) -> str:
    return f"{expr} and on (adapter) {BUSIEST}"


def above_0(label: str, metric: str, labels: str) -> str:
    """The $top series that are not 0, or one line at 0."""
    return f'{top(f"{by(label, metric, labels)} > 0")} or on () label_replace(vector(0), "{label}", "none", "", "")'


FAILED = (
    f"(sum(rate(perft_adapter_requests_total{{{S},{OUR_FAULT}}}{WINDOW})) or vector(0))"
    f" / sum(rate(perft_adapter_requests_total{{{S}}}{WINDOW}))"
)
FAILED_BY_ADAPTER = (
    f"sum by (adapter) (rate(perft_adapter_requests_total{{{A},{OUR_FAULT}}}{WINDOW}))"
    f" / sum by (adapter) (rate(perft_adapter_requests_total{{{A}}}{WINDOW}))"
)
TTFT, ITL, E2E = (
    "perft_adapter_time_to_first_token_seconds",
    "perft_adapter_inter_token_latency_seconds",
    "perft_adapter_e2e_seconds",
)
TIER_NUMBER = " or ".join(
    f'max by (adapter) (perft_adapter_resident{{{A},adapter!="_other",tier="{tier}"}}) * {number}'
    for tier, number in (("device", 3), ("host", 2), ("disk", 1))
)
TIERS = {"3": ("device", GREEN), "2": ("host", YELLOW), "1": ("disk", GREY)}
YES_NO = {"1": ("yes", GREEN), "0": ("no", RED)}
TIER_COLORS = {"device": GREEN, "host": YELLOW, "disk": GREY}


# Rows of panels, each panel with its width of 24


def stat(title: str, description: str, expr: str, unit: str = "short", *steps: tuple[float, str]) -> Panel:
    return Panel("stat", title, description, [Query(expr)], unit, steps or ((0, BLUE),))


def graph(title: str, description: str, *queries: Query, **more: Any) -> Panel:
    return Panel("timeseries", title, description, queries, **more)


WELL_ROW = [
    (3, stat(
        "Servers not ready", "Servers that Prometheus cannot scrape, or whose engine or shared store does not answer.",
        f'count(up{{job="perft",{S}}}) - (sum(perft_ready{{{S}}}) or vector(0))', "short", (0, GREEN), (1, RED),
    )),
    (3, stat(
        "Failed requests", "Share of the requests that ended with an error of the server: not what clients did wrong.",
        FAILED, "percentunit", (0, GREEN), (0.001, ORANGE), (0.05, RED),
    )),
    (3, stat(
        "Time to first token, p95", "Of all requests, from arrival, loading the adapter included.",
        quantile(0.95, TTFT), "s", (0, GREEN), (2, ORANGE), (5, RED),
    )),
    (3, stat("Requests running", "Sequences in the engines.", total("perft_adapter_requests_running"))),
    (3, stat(
        "Requests waiting", "For their adapter to be loaded or, while the engine is full, for a free sequence.",
        total("perft_adapter_requests_waiting"), "short", (0, GREEN), (1, ORANGE), (50, RED),
    )),
    (3, stat(
        "Device pool", "Rows in use. A full pool is normal, unless requests wait for adapters.",
        f"{total('perft_device_rows_used')} / {total('perft_device_rows_total')}", "percentunit",
        (0, GREEN), (0.95, ORANGE),
    )),
    (3, stat(
        "Store, free", "Least free space of the servers' disks; not known of a store that servers share.",
        f"min(perft_store_free_bytes{{{S}}})", "bytes", (0, RED), (5e9, ORANGE), (2e10, GREEN),
    )),
    (3, stat(
        "Defects", "Repairs of residency, and servers that loaded inside an engine step or have no layer with the "
        "operator. Anything but 0 is a defect: see the alerts.",
        f"sum(increase(perft_residency_repairs_total{{{S}}}[$__range])) + (count("
        f"increase(perft_step_load_bytes_total{{{S}}}[$__range]) > 0 or perft_moe_layers{{{S}}} == 0) or vector(0))",
        "short", (0, GREEN), (1, RED),
    )),
    (24, Panel(
        "state-timeline", "Alerts that fire",
        "deploy/prometheus/alerts.yml; each alert's description in Prometheus says what to do.",
        [Query(
            f'max by (alertname) (ALERTS{{{FIRING},severity="critical"}}) * 2'
            f" or max by (alertname) (ALERTS{{{FIRING}}})"
            ' or on () label_replace(vector(0), "alertname", "none", "", "")',
            "{{alertname}}",
        )],
        mappings={"0": ("", GREEN), "1": ("fires", ORANGE), "2": ("critical", RED)},
    )),
]  # fmt: skip

REQUESTS_ROW = [
    (8, graph(
        "Requests, by how they ended", "Of the engine, and adapter requests that failed while they waited.",
        Query(f"{rate('perft_adapter_requests_total', 'finish_reason')} > 0", "{{finish_reason}}"),
        unit="reqps", stack="normal",
        colors={"stop": GREEN, "length": BLUE, "abort": GREY, "error": RED, "engine_unavailable": RED},
    )),
    (8, graph(
        "HTTP responses", "Of the API, by class of status: refusals (401, 404, 429, ...) are 4xx.",
        Query(rate("http_requests_total", "status", S + ',handler=~"/v1/.*|none"'), "{{status}}"),
        unit="reqps", stack="normal", colors={"2xx": GREEN, "3xx": GREY, "4xx": ORANGE, "5xx": RED},
    )),
    (8, graph(
        "Running and waiting", "Waiting: for the adapter to be loaded, or for a free sequence of the full engine.",
        Query(total("perft_adapter_requests_running"), "running"),
        Query(total("perft_adapter_requests_waiting"), "waiting"),
        colors={"running": BLUE, "waiting": ORANGE},
    )),
    (8, graph(
        "Tokens per second", "Counted when a request ends.",
        Query(rate("perft_adapter_generation_tokens_total"), "generated"),
        Query(rate("perft_adapter_prompt_tokens_total"), "of prompts"),
        unit="suffix: tok/s",
    )),
    (16, graph(
        "Requests that did not end well", "How many, by adapter and reason; not those that their clients left. "
        "invalid_request: the engine refused what was asked for.",
        Query(
            "sum by (adapter, finish_reason) (increase("
            f'perft_adapter_requests_total{{{A},finish_reason!~"{ENDED_WELL}"}}{WINDOW})) > 0',
            "{{adapter}} {{finish_reason}}",
        ),
        bars=True, stack="normal",
    )),
]  # fmt: skip

LATENCY_ROW = [
    (8, graph(
        "Time to first token", "From a request's arrival, loading its adapter included. The line: the alert's.",
        *quantiles(TTFT), unit="s", steps=((0, GREEN), (5, RED)), lines_at_steps=True,
    )),
    (8, graph("Inter-token latency", "From one token of a request to its next.", *quantiles(ITL), unit="s")),
    (8, graph("Whole request", "From a request's arrival to its end.", *quantiles(E2E), unit="s")),
]  # fmt: skip

ADAPTERS_ROW = [
    (24, Panel(
        "table", "Adapters now", "The $top with most requests per second, of those selected above. The base has a line "
        "of its own; _other: all beyond the server's cap. A name leads to the console.",
        [
            Query(BUSIEST, column="requests/s"),
            Query(of_busiest(rate("perft_adapter_generation_tokens_total", "adapter", A)), column="tokens/s"),
            Query(of_busiest(by("adapter", "perft_adapter_requests_running", A)), column="running"),
            Query(of_busiest(by("adapter", "perft_adapter_requests_waiting", A)), column="waiting"),
            Query(of_busiest(quantile(0.95, TTFT, "adapter", A)), column="first token, p95"),
            Query(of_busiest(quantile(0.99, ITL, "adapter", A)), column="inter-token, p99"),
            Query(of_busiest(FAILED_BY_ADAPTER), column="failed"),
            Query(of_busiest(f"max by (adapter) ({TIER_NUMBER})"), column="is on"),
        ],
        units={
            "requests/s": "reqps", "tokens/s": "suffix: tok/s", "first token, p95": "s", "inter-token, p99": "s",
            "failed": "percentunit",
        },
        mappings=TIERS, link="adapter",
    )),
    (8, graph(
        "Requests per second", "The $top busiest.",
        Query(BUSIEST, "{{adapter}}"), unit="reqps",
    )),
    (8, graph(
        "Generated tokens per second", "The $top busiest.",
        Query(top(rate("perft_adapter_generation_tokens_total", "adapter", A)), "{{adapter}}"), unit="suffix: tok/s",
    )),
    (8, graph(
        "Waiting requests", "Those of an adapter alone: it is being loaded. Of all: the engine is full.",
        Query(above_0("adapter", "perft_adapter_requests_waiting", A), "{{adapter}}"),
        stack="normal",
    )),
    (8, graph(
        "Time to first token, p95", "The $top slowest. The line: the alert's.",
        Query(top(quantile(0.95, TTFT, "adapter", A)), "{{adapter}}"), unit="s", steps=((0, GREEN), (5, RED)),
        lines_at_steps=True,
    )),
    (8, graph(
        "Inter-token latency, p99", "The $top slowest.", Query(top(quantile(0.99, ITL, "adapter", A)), "{{adapter}}"),
        unit="s",
    )),
    (8, graph(
        "Running requests", "The $top busiest.",
        Query(above_0("adapter", "perft_adapter_requests_running", A), "{{adapter}}"),
        stack="normal",
    )),
]  # fmt: skip

RESIDENCY_ROW = [
    (12, Panel(
        "state-timeline", "Where adapters are", "The active version of each, on any server: on the device requests are "
        "served at once; from the host or the disk it is loaded first.",
        [Query(f"max by (adapter) ({TIER_NUMBER})", "{{adapter}}")], mappings=TIERS,
    )),
    (6, graph(
        "Adapters by tier", "Active versions, over all servers.",
        Query(by("tier", "perft_adapter_resident"), "{{tier}}"), stack="normal", colors=TIER_COLORS,
    )),
    (6, graph(
        "Device pool", "Rows in use, by server. A full pool is normal, unless requests wait.",
        Query(f"perft_device_rows_used{{{S}}} / perft_device_rows_total{{{S}}}", "{{instance}}"), unit="percentunit",
        maximum=1, steps=((0, GREEN), (0.95, ORANGE)), lines_at_steps=True,
    )),
    (6, graph(
        "Loads", "Of adapters to the host or the device.",
        Query(rate("perft_adapter_loads_total", "result"), "{{result}}"), unit="ops",
        colors={"ok": GREEN, "failed": RED},
    )),
    (6, graph(
        "Load time, p95", "Of loads that went well, by the tier that they loaded to.",
        Query(quantile(0.95, "perft_adapter_load_seconds", "tier"), "{{tier}}"), unit="s", colors=TIER_COLORS,
    )),
    (6, graph(
        "Evictions", "Adapters evicted to make room, by tier.",
        Query(rate("perft_adapter_evictions_total", "tier"), "{{tier}}"), unit="ops", colors=TIER_COLORS,
    )),
    (6, graph(
        "Evictions from the device per request", "Near 0 if the pool is large enough. The line: the alert's.",
        Query(
            f'sum by (instance) (rate(perft_adapter_evictions_total{{{S},tier="device"}}{WINDOW}))'
            f" / sum by (instance) (rate(perft_adapter_requests_total{{{S}}}{WINDOW}))", "{{instance}}",
        ),
        steps=((0, GREEN), (0.5, RED)), lines_at_steps=True,
    )),
    (12, graph(
        "Tokens by expert", "The share of each PEFT expert in the sampled tokens of all adapters selected above; "
        "select one to see its own.",
        Query(rate("perft_expert_tokens_total", "expert", A), "expert {{expert}}"), stack="percent",
    )),
    (12, graph(
        "Largest share of one expert", "1 means that the adapter's router has collapsed, 1/M that M experts share "
        "evenly. The line: the alert's.",
        Query(
            f"max by (adapter) ({rate('perft_expert_tokens_total', 'adapter, expert', A)})"
            f" / {rate('perft_expert_tokens_total', 'adapter', A)}", "{{adapter}}",
        ),
        unit="percentunit", maximum=1, steps=((0, GREEN), (0.95, RED)), lines_at_steps=True,
    )),
]  # fmt: skip

STORE_ROW = [
    (8, graph(
        "Uploads", "How many, by outcome: created, existing, or the error's code.",
        Query(f"sum by (result) (increase(perft_uploads_total{{{S}}}{WINDOW})) > 0", "{{result}}"), bars=True,
        stack="normal", colors={"created": GREEN, "existing": BLUE, "invalid_adapter": ORANGE, "error": RED},
    )),
    (8, graph(
        "Store", "What the adapters take on disk, by server (of a shared store each says the same).",
        Query(by("instance", "perft_store_bytes"), "{{instance}}"), unit="bytes",
    )),
    (8, graph(
        "Free space", "Of the store's disk; not known of a store that servers share. The line: the alert's.",
        Query(by("instance", "perft_store_free_bytes"), "{{instance}}"), unit="bytes",
        steps=((0, RED), (5e9, GREEN)), lines_at_steps=True,
    )),
]  # fmt: skip

SERVERS_ROW = [
    (24, Panel(
        "table", "Servers now", "A server that does not answer Prometheus has a line without numbers.",
        [
            Query(f'max by (instance) (perft_ready{{{S}}}) or max by (instance) (up{{job="perft",{S}}} == 0)',
                  column="ready"),
            Query(f'max by (instance) (time() - process_start_time_seconds{{job="perft",{S}}})', column="up for"),
            Query(rate("perft_adapter_requests_total", "instance"), column="requests/s"),
            Query(rate("perft_adapter_generation_tokens_total", "instance"), column="tokens/s"),
            Query(by("instance", "perft_adapter_requests_running"), column="running"),
            Query(by("instance", "perft_adapter_requests_waiting"), column="waiting"),
            Query(quantile(0.95, TTFT, "instance"), column="first token, p95"),
            Query(by("instance", "vllm:num_gpu_loaded_lora_adapters"), column="adapters on device"),
            Query(by("instance", "vllm:max_gpu_lora_adapters"), column="of"),
            Query(f'max by (instance) (process_resident_memory_bytes{{job="perft",{S}}})', column="memory"),
        ],
        units={
            "up for": "s", "requests/s": "reqps", "tokens/s": "suffix: tok/s", "first token, p95": "s",
            "memory": "bytes",
        },
        mappings=YES_NO,
    )),
    (6, graph(
        "Requests per second, by server", "Of a well-balanced fleet all are alike.",
        Query(rate("perft_adapter_requests_total", "instance"), "{{instance}}"), unit="reqps",
    )),
    (6, graph(
        "Requests in hand, by server", "Running and waiting.",
        Query(
            f"{by('instance', 'perft_adapter_requests_running')} + {by('instance', 'perft_adapter_requests_waiting')}",
            "{{instance}}",
        ),
    )),
    (6, graph(
        "Shared store: silence", "Seconds since it last answered a server. Beyond --store-lag-s (2 s) requests for "
        "adapters wait, and fail. Empty where servers share no store.",
        Query(f"max by (instance) (perft_store_silent_seconds{{{S}}})", "{{instance}}"), unit="s",
        steps=((0, GREEN), (2, RED)), lines_at_steps=True,
    )),
    (6, graph(
        "Shared store: names behind", "Names that others changed and this server has not taken over yet: requests for "
        "these wait.",
        Query(f"max by (instance) (perft_store_names_behind{{{S}}})", "{{instance}}"),
    )),
]  # fmt: skip

ENGINE_ROW = [
    (6, graph(
        "Engine queue", "vLLM's own: requests in its batch, and the few that it has not scheduled yet.",
        Query(total("vllm:num_requests_running"), "running"), Query(total("vllm:num_requests_waiting"), "waiting"),
        colors={"running": BLUE, "waiting": ORANGE},
    )),
    (6, graph(
        "KV cache", "Blocks in use.", Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{S}}})", "{{instance}}"),
        unit="percentunit", maximum=1,
    )),
    (6, graph(
        "Prefix cache hits", "Share of prompt tokens found in the cache.",
        Query(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "hits"),
        unit="percentunit", maximum=1,
    )),
    (6, graph(
        "Preemptions", "Requests that lost their blocks for lack of KV cache, and are computed again.",
        Query(rate("vllm:num_preemptions_total", "instance"), "{{instance}}"), unit="ops",
    )),
    (6, graph(
        "Tokens per step", "Mean of the engine's steps: the size of its batches.",
        Query(mean("vllm:iteration_tokens_total"), "{{instance}}"),
    )),
    (6, graph(
        "Queue time in the engine", "Mean, from vLLM's acceptance of a request to its first step.",
        Query(mean("vllm:request_queue_time_seconds"), "{{instance}}"), unit="s",
    )),
    (6, graph(
        "Memory of the server's process", "Without the engine's own process.",
        Query(f'max by (instance) (process_resident_memory_bytes{{job="perft",{S}}})', "{{instance}}"), unit="bytes",
    )),
    (6, graph(
        "CPU of the server's process", "1 is one core, which is all that its event loop can use.",
        Query(f'max by (instance) (rate(process_cpu_seconds_total{{job="perft",{S}}}{WINDOW}))', "{{instance}}"),
    )),
]  # fmt: skip

ROWS: list[tuple[str, list[tuple[int, Panel]]]] = [
    ("Is it well?", WELL_ROW),
    ("Requests", REQUESTS_ROW),
    ("Latency", LATENCY_ROW),
    ("By adapter", ADAPTERS_ROW),
    ("Residency and experts", RESIDENCY_ROW),
    ("Uploads and store", STORE_ROW),
    ("Servers", SERVERS_ROW),
    ("Engine (vLLM) and process", ENGINE_ROW),
]
