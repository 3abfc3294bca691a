"""deploy/prometheus in a real Prometheus: promtool accepts it, a server is scraped, queries answer, alerts fire."""

import re
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from integration.busy_servers import busy_servers
from integration.panel_answers import Span, ask, ask_all, read, report
from integration.panel_drawing import draw
from integration.prometheus import DEPLOYED, SCRAPE_S, Prometheus, promtool, scraping, write_configuration
from integration.target import Target
from tests.server.processes import LIMIT_S, free_port

ONE_SERIES = ("perft_moe_layers", "perft_device_rows_total", "perft_device_rows_used", "perft_store_bytes")
WORK_S = 60.0
MADE_UP_KEY = "made-up-metrics-key"
# Alerts without a waiting time whose condition the made-up server counts at every scrape.
AT_ONCE = {
    "PerftStepLoadBytes",
    "PerftResidencyRepaired",
    "PerftAdapterOutputInvalid",
    "PerftLoadsFail",
    "PerftUploadsFail",
}


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "alerts.yml")


def test_every_alert_fires_in_its_condition_and_not_below() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    """Except the target and the key's file, which exists only in the container."""
    promtool("check", "config", str(write_configuration(tmp_path, ["server:8000"], "a-key")))


def is_up(prometheus: Prometheus, expected: int) -> None:
    prometheus.wait_for(lambda: prometheus.value('up{job="perft"}'), lambda value: value == expected)


@pytest.fixture(scope="module")
def of_target(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with scraping(tmp_path_factory.mktemp("of-target"), [target.address], target.metrics_key) as prometheus:
        is_up(prometheus, 1)
        yield prometheus


def test_the_server_is_scraped_with_its_key(of_target: Prometheus, target: Target) -> None:
    for name in ONE_SERIES:
        assert of_target.value(name) is not None, name
    layers = of_target.value("perft_moe_layers")
    assert layers is not None and layers > 0
    assert of_target.value("perft_step_load_bytes_total") == 0
    assert of_target.query(f'perft_adapter_requests_running{{adapter="{target.base}"}}')
    assert of_target.query(f'perft_adapter_resident{{adapter="{target.adapter}"}}')
    for name in ("vllm:num_requests_running", "vllm:lora_requests_info"):
        assert len(of_target.query(name)) == 1, name


def test_every_panel_of_the_dashboard_has_data_and_can_be_drawn(tmp_path: Path) -> None:
    image = tmp_path / "dashboard.png"
    with busy_servers(tmp_path) as busy:
        busy.work(WORK_S)
        end = time.time()
        span = Span(end - WORK_S, end, SCRAPE_S)
        answered = ask_all(busy.prometheus, span)
        draw(answered, span, image)
    assert sum(len(each.found) for each in answered) > 60
    assert report(answered) == []
    with Image.open(image) as drawn:
        assert drawn.width > 1000 and drawn.height > 3000


def test_a_panel_without_data_is_named_and_drawn_as_empty(of_target: Prometheus, tmp_path: Path) -> None:
    end = time.time()
    span = Span(end - 60, end, SCRAPE_S)
    (stat,) = (panel for panel in read()["panels"] if panel["title"] == "Requests waiting")
    stat["targets"][0]["expr"] = 'perft_adapter_requests_waiting{instance=~"$instance",adapter="nix"}'
    answered = [ask(of_target, stat, span)]
    draw(answered, span, tmp_path / "empty.png")
    assert report(answered) == ["Requests waiting: query A found nothing"]
    stat["targets"][0]["expr"] = "sum("
    with pytest.raises(urllib.error.HTTPError):
        ask(of_target, stat, span)


def test_a_healthy_server_fires_no_alert(of_target: Prometheus) -> None:
    def evaluated() -> list[dict[str, str]]:
        return [rule for group in of_target.get("rules")["groups"] for rule in group["rules"]]

    rules = of_target.wait_for(evaluated, lambda found: all(rule["health"] != "unknown" for rule in found))
    assert rules and {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_a_wrong_key_is_not_let_in(target: Target, tmp_path: Path) -> None:
    with scraping(tmp_path, [target.address], "not-the-metrics-key") as prometheus:
        is_up(prometheus, 0)
        prometheus.wait_for(
            lambda: [each["lastError"] for each in prometheus.get("targets")["activeTargets"]],
            lambda errors: len(errors) == 1 and "401" in errors[0],
        )


@pytest.fixture(scope="module")
def of_made_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "integration.made_up_server", "--port", str(port), "--key", MADE_UP_KEY],
        cwd=DEPLOYED.parents[1],
    )
    try:
        with scraping(tmp_path_factory.mktemp("made-up"), [f"127.0.0.1:{port}"], MADE_UP_KEY) as prometheus:
            is_up(prometheus, 1)
            yield prometheus
    finally:
        server.terminate()
        server.wait(LIMIT_S)


def test_five_thousand_adapter_names_stay_under_the_cap(of_made_up: Prometheus) -> None:
    """500 names, the base and _other are shown. After a scrape that came too late none is: then the next one tells."""
    names = 'count(count by (adapter) ({adapter!="",job="perft"}))'
    others = 'perft_adapter_requests_total{adapter="_other",finish_reason="stop"}'
    of_made_up.wait_for(
        lambda: (of_made_up.value(names), of_made_up.value(others)), lambda found: found == (502, 4_500)
    )
    samples = of_made_up.wait_for(lambda: of_made_up.value('scrape_samples_scraped{job="perft"}'), bool)
    assert samples is not None and samples < 40_000


def test_alerts_fire_and_say_what_to_do(of_made_up: Prometheus) -> None:
    def firing() -> dict[str, dict[str, str]]:
        alerts = of_made_up.get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["annotations"] for alert in alerts if alert["state"] == "firing"}

    said = of_made_up.wait_for(firing, lambda found: set(found) >= AT_ONCE)
    assert set(said) == AT_ONCE
    for annotations in said.values():
        assert not re.search(r"\{\{|<no value>|error expanding", "".join(annotations.values()))
    assert said["PerftAdapterOutputInvalid"]["summary"].startswith("tenant-0000 ")
