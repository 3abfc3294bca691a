"""deploy/ holds together: it parses, names only metrics that exist, files that are there, and every alert is tested.

That the rules and queries mean what they say is for promtool and a real Prometheus (`make integration`).
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from server.metrics.counters import FINISH_REASONS, LOAD_RESULTS, LOAD_TIERS, UPLOAD_RESULTS, EventCounters
from server.metrics.snapshot import StateCollector, StateSnapshot

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "perft.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ALERT_TESTS = DEPLOY / "prometheus" / "alerts_test.yml"
METRICS_PAGE = ROOT / "docs" / "metrics.md"
METRIC = re.compile(r"\b(?:perft_|vllm:|http_requests_|process_)[a-z0-9_:]+")
LABELS = {"job", "adapter", "expert", "handler", "alertname", "alertstate"}
LABEL_VALUES = {
    "status": {"2xx", "3xx", "4xx", "5xx"},
    "severity": {"critical", "warning", "info"},
    "tier": {*LOAD_TIERS, "disk"},
    "result": {*LOAD_RESULTS, *UPLOAD_RESULTS},
    "finish_reason": set(FINISH_REASONS),
}


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]


def our_samples() -> set[str]:
    """Every name of ours that a query may use."""
    registry = CollectorRegistry()
    metrics = EventCounters(registry)
    registry.register(StateCollector(metrics, lambda: StateSnapshot({}, 0)))
    return set(registry._names_to_collectors)


def vllms_samples() -> set[str]:
    """Every metric of the installed vLLM, off its source: importing it would start half an engine."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    names = set(re.findall(r'name="(vllm:[a-z0-9_:]+)"', source))
    assert len(names) > 20
    return names | {name + suffix for name in names for suffix in ("_total", "_bucket", "_sum", "_count")}


OTHERS = {
    "http_requests_total",
    "process_start_time_seconds",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
}
"""Not vLLM's own, but on its page: tests/server/test_metrics_http.py looks at a real one."""


def dashboard_queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


QUERIES = [*dashboard_queries(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_file_parses(path: Path) -> None:
    assert isinstance(read_yaml(path), dict)


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_only_metrics_that_exist(query: str) -> None:
    named = set(METRIC.findall(query))
    assert named or re.search(r"\b(up|ALERTS)\{", query), query
    assert named <= our_samples() | vllms_samples() | OTHERS


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_only_label_values_that_exist(query: str) -> None:
    for label, operator, values in re.findall(r'(\w+)(=|!=|=~|!~)"([^"$]*)"', query):
        assert label in {*LABEL_VALUES, *LABELS}, query
        if label in LABEL_VALUES:
            assert set(values.split("|") if "~" in operator else [values]) <= LABEL_VALUES[label], query


def test_every_metric_of_ours_is_watched() -> None:
    """On the dashboard or by an alert; what is for routers need not be."""
    watched = {re.sub(r"_bucket$", "", name) for query in QUERIES for name in METRIC.findall(query)}
    ours = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in our_samples()}
    assert {re.sub(r"_total$", "", name) for name in watched} >= {name for name in ours if not name.startswith("vllm:")}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_what_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert len(rule["annotations"]["description"]) > 80


def test_every_alert_is_tested_both_ways() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    tests = read_yaml(ALERT_TESTS)
    assert tests["rule_files"] == [ALERTS.name]
    for test in tests["tests"]:
        assert len(test["promql_expr_test"]) == 1 and test["input_series"]
        (expected,) = test["promql_expr_test"]
        found = re.fullmatch(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}', expected["expr"])
        assert found is not None and test["name"].startswith(found[1])
        (fires if expected["exp_samples"] else silent).add(found[1])
    named = [rule["alert"] for rule in rules()]
    assert len(named) == len(set(named))
    assert fires == silent == set(named)


def test_every_metric_of_ours_is_documented_and_no_other() -> None:
    page = METRICS_PAGE.read_text(encoding="utf-8")
    ours = {name for name in our_samples() if not name.endswith("_created")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours}
    documented = set(re.findall(r"`((?:perft_|vllm:)\w+)`", page))
    assert documented >= {name for name in families if f"{name}_total" not in families}
    assert set(METRIC.findall(page)) <= ours | families | vllms_samples() | OTHERS


def test_every_alert_is_documented_with_its_severity() -> None:
    rows = re.findall(r"^\| `(Perft\w+)` \| (\w+) \|", METRICS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted((rule["alert"], rule["labels"]["severity"]) for rule in rules())


def test_the_dashboard_is_what_its_script_writes() -> None:
    script = DEPLOY / "grafana" / "dashboard.py"
    written = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    assert DASHBOARD.read_text(encoding="utf-8") == written, f"run python {script.relative_to(ROOT)}"


def test_panels_are_whole_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["description"] and panel["targets"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_dashboard_filters_by_adapter_and_finds_its_data_source() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "adapter", "top", "console"]
    (console,) = dashboard()["links"]
    assert console["url"] == "${console}" and variables["console"]["query"].endswith(":8000/")
    used = {name for query in dashboard_queries() for name in re.findall(r"\$\{?(\w+)", query)}
    assert used <= {*variables, "__rate_interval", "__range"}
    (source,) = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert variables["datasource"]["current"]["value"] == source["uid"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in read_yaml(DEPLOY / "compose.yaml")["services"]


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_yaml(DEPLOY / "compose.yaml")["services"]
    return found


def test_compose_mounts_only_what_is_there() -> None:
    compose = read_yaml(DEPLOY / "compose.yaml")
    for service in services().values():
        for mount in service["volumes"]:
            source, target = mount.split(":")[:2]
            assert target.startswith("/")
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], mount
        assert set(service["secrets"]) <= set(compose["secrets"])
    build = services()["server"]["build"]
    dockerfile = (DEPLOY / build["context"] / "Dockerfile").read_text(encoding="utf-8")
    assert f" AS {build['target']}\n" in dockerfile


def test_compose_pins_versions_checks_health_and_stays_on_this_machine() -> None:
    for name, service in services().items():
        assert name == "server" or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
        assert service["healthcheck"]["test"][0] == "CMD"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
    assert services()["server"]["healthcheck"]["test"][-1].endswith("/ready")


def test_compose_for_a_gpu_changes_the_server_alone() -> None:
    over: dict[str, Any] = read_yaml(DEPLOY / "compose.gpu.yaml")["services"]
    assert set(over) == {"server"}
    server, target = over["server"], over["server"]["build"]["target"]
    assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert server["image"] == f"perft-server:{target}" != services()["server"]["image"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    mounted = {mount.split(":")[1] for mount in server["volumes"]}
    folders = {word.partition("=")[2] for word in server["command"] if "=" in word}
    assert folders and all(str(Path(folder).parent) in mounted for folder in folders)


def test_prometheus_scrapes_the_server_with_its_key() -> None:
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    (scrape,) = config["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    assert target.partition(":")[0] in services()
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    assert "metrics_key" in services()["prometheus"]["secrets"]
    assert config["rule_files"] == [ALERTS.name] and scrape["job_name"] == "perft"


def test_secrets_are_made_once_and_are_those_that_compose_names(tmp_path: Path) -> None:
    command = ["sh", str(DEPLOY / "make-secrets.sh"), str(tmp_path / "secrets")]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    compose = read_yaml(DEPLOY / "compose.yaml")
    assert {f"./secrets/{name}" for name in made} == {secret["file"] for secret in compose["secrets"].values()}
    assert len(set(made.values())) == 4 and all(len(value.strip()) >= 48 for value in made.values())
    assert re.fullmatch(r"first=[0-9a-f]{48}\n", made["api_keys"])
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made


@pytest.fixture
def start(tmp_path: Path) -> list[str]:
    """start-server.sh with secrets, and a `perft` and a `python` that only say how they were called."""
    for name, text in {"api_keys": "# who\na=key-a\nb=key-b\n", "admin_key": "adm\n", "metrics_key": "met\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "perft").write_text('#!/bin/sh\nenv | grep ^PERFT_ | sort\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *server.demo.__path__*) echo {ROOT}/server/demo;; *-c*) echo /cache/base;; esac\n'
    )
    for program in ("perft", "python"):
        (tmp_path / program).chmod(0o755)
    return [
        "env",
        f"SECRETS_FOLDER={tmp_path}",
        f"PATH={tmp_path}:{os.environ['PATH']}",
        "sh",
        str(DEPLOY / "start-server.sh"),
    ]


KEYS = ["PERFT_ADMIN_KEY=adm", "PERFT_API_KEYS=a=key-a,b=key-b", "PERFT_METRICS_KEY=met"]


def test_the_container_serves_what_it_is_told_with_its_keys(start: list[str]) -> None:
    said = subprocess.run([*start, "org/model", "--adapter", "a=/a b"], check=True, capture_output=True, text=True)
    host = ["--host", "0.0.0.0", "--port", "8000"]
    assert said.stdout.splitlines() == [*KEYS, "serve", "org/model", "--adapter", "a=/a b", *host]


def test_the_container_serves_the_demo_if_it_is_told_nothing(start: list[str]) -> None:
    said = subprocess.run(start, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[:5] == [*KEYS, "serve", "/cache/base"]
    folders = sorted(path for path in (ROOT / "server" / "demo" / "adapters").iterdir() if path.is_dir())
    assert folders and [word for word in said if word.startswith(tuple(f"{path.name}=" for path in folders))] == [
        f"{path.name}={path}" for path in folders
    ]


@pytest.mark.parametrize("name", ["api_keys", "admin_key", "metrics_key"])
def test_a_missing_or_empty_secret_ends_the_start(start: list[str], tmp_path: Path, name: str) -> None:
    """Without API keys the server would take requests from everybody."""
    for spoil in (lambda path: path.write_text(""), lambda path: path.unlink()):
        spoil(tmp_path / name)
        said = subprocess.run([*start, "org/model"], check=False, capture_output=True, text=True)
        assert said.returncode == 1 and name in said.stderr and "make-secrets.sh" in said.stderr


def test_a_file_without_a_key_ends_the_start(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "api_keys").write_text("# a=key-a\n")
    said = subprocess.run([*start, "org/model"], check=False, capture_output=True, text=True)
    assert said.returncode == 1 and said.stdout == "" and f"found no key in {tmp_path}/api_keys" in said.stderr


def test_a_secret_that_may_not_be_read_ends_the_start(start: list[str], tmp_path: Path) -> None:
    """As a file of mode 600 that a container gets as it is. Root may read all, and so becomes another user."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
        Path(folder).chmod(0o755)
        (Path(folder) / "api_keys").chmod(0)
        moved = [word.replace(str(tmp_path), folder) for word in start]
        user = 65534 if os.geteuid() == 0 else None
        said = subprocess.run(
            [*moved[:-1], "-c", (DEPLOY / "start-server.sh").read_text(), "start-server", "org/model"],
            check=False, capture_output=True, text=True, user=user,
        )  # fmt: skip
    assert said.returncode == 1 and said.stdout == ""
    assert f"{folder}/api_keys, expected a file that user {user or os.getuid()} may read: run chmod 444" in said.stderr


TRY_IMAGE = DEPLOY / "try-image.sh"


def test_the_image_is_tried_as_compose_runs_it() -> None:
    script, server = TRY_IMAGE.read_text(encoding="utf-8"), services()["server"]
    for mount in server["volumes"]:
        source, target, *mode = mount.split(":")
        given = ":".join(['"$deploy' + source.removeprefix("."), target, *mode]) if source[0] == "." else f':{target}"'
        assert given in script, mount
    (secrets,) = re.findall(r"for secret in (.*); do", script)
    assert secrets.split() == server["secrets"]
    for flag in ("--read-only", "--tmpfs /tmp", "--cap-drop ALL", "--security-opt no-new-privileges", "--shm-size 2g"):
        assert flag in script, flag
    assert server["read_only"] and server["tmpfs"] == ["/tmp"] and server["shm_size"] == "2gb"
    assert server["security_opt"] == ["no-new-privileges:true"] and f"--tag {server['image']}" not in script
    assert f"image={server['image']}\n" in script and f"--target {server['build']['target']}" in script
    assert server["entrypoint"] == ["sh", "/usr/local/bin/start-server"] and not server["command"]


def test_the_images_run_as_one_user_and_take_torch_from_where_make_does() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"useradd .*--uid (\d+) perft", dockerfile)
    assert f"\nuser={user}\n" in TRY_IMAGE.read_text(encoding="utf-8")
    for target in dockerfile.split("FROM base AS ")[1:]:
        assert "USER perft\nWORKDIR /home/perft\n" in target and "\nHEALTHCHECK " in target
    (index,) = re.findall(r"\nARG TORCH_INDEX=(\S+)\n", dockerfile)
    bootstrap = (ROOT / "requirements" / "bootstrap.py").read_text(encoding="utf-8")
    assert f'TORCH_CPU_INDEX = "{index}"\n' in bootstrap


def test_a_tool_that_is_none_is_refused() -> None:
    said = subprocess.run(["bash", str(TRY_IMAGE), "rkt"], check=False, capture_output=True, text=True)
    assert said.returncode == 1 and said.stderr == "try-image: found rkt, expected docker, podman or buildah\n"
