"""deploy/kubernetes: Kustomize builds it, it follows the schemas, and it fits the server. No cluster has run it."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from vllm.v1.metrics import loggers

from integration.kubernetes import DEPLOYED, VERSIONS, Resource, built, named, pod_templates, problems_of
from server.api.health import READY_TIMEOUT_S
from server.api.route_table import ROUTES, routes_at
from server.auth.origin import bind_problem
from server.hosting.arguments import argument_problems, parse_arguments
from server.metrics.counters import EventCounters
from server.metrics.snapshot import StateCollector, StateSnapshot
from server.settings.model import Settings
from server.settings.sources import environment_problems

ROOT = DEPLOYED.parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
AFTER_SHUTDOWN_S = 30
"""What docs/operations.md says an orchestrator gives beyond --shutdown-timeout-s."""
SERVER = {"app.kubernetes.io/name": "perft", "app.kubernetes.io/component": "server"}
DEPLOYMENTS = ("overlays/cpu", "overlays/gpu", "overlays/llm-d", "scaled")
FOLDERS = (*DEPLOYMENTS, "ray")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Resource]]:
    """What each folder makes. `scaled` is the overlay for GPUs with the component autoscaling."""
    folder = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(DEPLOYED, folder)
    (folder / "scaled").mkdir()
    (folder / "scaled" / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["../overlays/gpu"], "components": ["../components/autoscaling"]})
    )
    return {name: built(folder / name) for name in FOLDERS}


@pytest.fixture(params=FOLDERS)
def resources(request: pytest.FixtureRequest, everything: dict[str, list[Resource]]) -> list[Resource]:
    return everything[request.param]


@pytest.fixture(params=DEPLOYMENTS)
def deployed(request: pytest.FixtureRequest, everything: dict[str, list[Resource]]) -> list[Resource]:
    return everything[request.param]


@pytest.fixture
def behind_llm_d(everything: dict[str, list[Resource]]) -> list[Resource]:
    return everything["overlays/llm-d"]


def container_of(template: Resource) -> dict[str, Any]:
    (found,) = template["spec"]["containers"]
    return dict(found)


def serving_templates(resources: list[Resource]) -> Iterator[Resource]:
    """Of the pods that run a server: those that have its keys."""
    for _, template in pod_templates(resources):
        if any(volume["name"] == "keys" for volume in template["spec"].get("volumes", [])):
            yield template


def settings_of(resources: list[Resource]) -> dict[str, str]:
    """The variables of the ConfigMap of settings."""
    (found,) = (each for each in resources if each["metadata"]["name"].startswith("perft-settings-"))
    return dict(found["data"])


def environment_of(resources: list[Resource], template: Resource) -> dict[str, str]:
    """All of a server's own variables; `a-secret-key` stands for what a Secret gives."""
    own = {each["name"]: each.get("value", "a-secret-key") for each in container_of(template).get("env", [])}
    return settings_of(resources) | own


def bytes_of(quantity: str) -> int:
    found = re.fullmatch(r"(\d+)Gi", quantity)
    assert found is not None, quantity
    return int(found[1]) * 2**30


def test_everything_follows_its_schema(resources: list[Resource]) -> None:
    for version in VERSIONS:
        assert [problem for each in resources for problem in problems_of(each, version)] == []


def test_a_field_that_no_schema_names_is_found(everything: dict[str, list[Resource]]) -> None:
    kinds = {each["kind"]: each for resources in everything.values() for each in resources if "spec" in each}
    assert {"InferencePool", "HTTPRoute", "RayService", "PodMonitor", "ScaledObject", "Deployment"} <= set(kinds)
    for resource in kinds.values():
        spoiled = copy.deepcopy(resource)
        spoiled["spec"]["notAField"] = 1
        assert list(problems_of(spoiled, VERSIONS[-1])), resource["kind"]
    for kind in ("Deployment", "RayService"):
        spoiled = copy.deepcopy(kinds[kind])
        (_, template), *_ = pod_templates([spoiled])
        template["spec"]["containers"][0]["readynessProbe"] = {}
        assert list(problems_of(spoiled, VERSIONS[-1])), kind


def selectors(resources: list[Resource]) -> Iterator[tuple[str, dict[str, str], str]]:
    """(what selects, the labels, whose pods it means) of everything that selects pods."""
    for resource in resources:
        kind, name, spec = resource["kind"], resource["metadata"]["name"], resource.get("spec", {})
        whose = "picker" if "picker" in name else "server"
        if kind == "Service":
            yield f"{kind} {name}", spec["selector"], whose
        elif kind in ("Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool"):
            yield f"{kind} {name}", spec["selector"]["matchLabels"], whose
        elif kind == "NetworkPolicy":
            yield f"{kind} {name}", spec["podSelector"]["matchLabels"], whose
        if kind == "Deployment":
            for spread in spec["template"]["spec"].get("topologySpreadConstraints", []):
                yield f"{kind} {name}, spread", spread["labelSelector"]["matchLabels"], whose


def test_every_selector_selects_the_pods_it_means_and_no_others(deployed: list[Resource]) -> None:
    pods = {name: template["metadata"]["labels"] for name, template in pod_templates(deployed)}
    found = list(selectors(deployed))
    assert len(found) >= 5
    for what, labels, whose in found:
        selected = {name for name, given in pods.items() if labels.items() <= given.items()}
        assert selected == {"perft" if whose == "server" else "perft-picker"}, what


def test_names_lead_somewhere(resources: list[Resource]) -> None:
    """ConfigMaps, ports by name, the picker's Service, what is scaled and who has rights."""
    there = {(each["kind"], each["metadata"]["name"]) for each in resources}
    for _, template in pod_templates(resources):
        container, spec = container_of(template), template["spec"]
        sources = [each["configMapRef"]["name"] for each in container.get("envFrom", []) if "configMapRef" in each]
        sources += [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each]
        assert {("ConfigMap", name) for name in sources} <= there
        assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}
        ports = {each["name"] for each in container["ports"]}
        probes = [container[name] for name in container if name.endswith("Probe")]
        assert {str(probe["httpGet"]["port"]) for probe in probes if "httpGet" in probe} <= ports | {"52365"}
    for each in resources:
        if each["kind"] == "InferencePool":
            assert ("Service", each["spec"]["endpointPickerRef"]["name"]) in there
        if each["kind"] == "RoleBinding":
            assert {(one["kind"], one["name"]) for one in (*each["subjects"], each["roleRef"])} <= there
        if each["kind"] == "ScaledObject":
            assert ("Deployment", each["spec"]["scaleTargetRef"]["name"]) in there
            assert "replicas" not in named(resources, "Deployment")["spec"]


def test_settings_exist_and_fit_together(
    resources: list[Resource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the keys that make-secrets.sh makes, as a Secret's volume shows them."""
    subprocess.run(["sh", str(ROOT / "deploy" / "make-secrets.sh"), str(tmp_path)], check=True, capture_output=True)
    for file in tmp_path.iterdir():
        file.chmod(0o440)
    templates = list(serving_templates(resources))
    assert len(templates) == 1
    environment = environment_of(resources, templates[0])
    assert environment_problems(environment) == []
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("/etc/perft/keys", str(tmp_path)))
    settings = Settings()
    assert settings.key_ring.has_admin and settings.key_ring.needs_key
    assert str(settings.adapter_store).startswith("s3://")
    assert settings.key_ring.has_metrics_key or settings.metrics_address is not None
    assert not bind_problem("0.0.0.0", settings.key_ring.has_admin)


def commands(deployed: list[Resource]) -> list[list[str]]:
    """What `perft` is called with."""
    found = []
    for template in serving_templates(deployed):
        container = container_of(template)
        if "command" not in container:
            found.append(container["args"])
            continue
        *_, last = container["args"][0].replace("\\\n", " ").strip().splitlines()
        words = shlex.split(last)
        assert words[:2] == ["exec", "perft"]  # so that SIGTERM reaches the server
        found.append(words[2:])
    return found


def test_perft_serve_takes_the_command_line(deployed: list[Resource]) -> None:
    (words,) = commands(deployed)
    assert words[0] == "serve"
    args = parse_arguments(words[1:])
    assert argument_problems(args) == [] and args.model_tag
    (template,) = serving_templates(deployed)
    assert args.host == "0.0.0.0" and {"name": "http", "containerPort": args.port} in container_of(template)["ports"]
    assert f"EXPOSE {args.port}\n" in DOCKERFILE
    (service,) = (each for each in named(deployed, "Service")["spec"]["ports"])
    assert (service["port"], service["targetPort"]) == (args.port, "http")


def test_probes_ask_routes_without_keys_and_wait_long_enough(deployed: list[Resource]) -> None:
    (template,) = serving_templates(deployed)
    container = container_of(template)
    startup, readiness, liveness = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    for probe in (startup, readiness, liveness):
        (route,) = routes_at(probe["httpGet"]["path"])
        assert (route.method, route.need) == ("GET", "none")
    assert readiness["httpGet"]["path"] == "/ready" and readiness["timeoutSeconds"] > READY_TIMEOUT_S
    # A restart mends none of what makes /ready 503: the store is cut off, the engine is busy, the server drains.
    assert liveness["httpGet"]["path"] == startup["httpGet"]["path"] == "/health"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert named(deployed, "Deployment")["spec"]["progressDeadlineSeconds"] > 1800


def test_a_pod_ends_no_sooner_than_its_streams_may(deployed: list[Resource]) -> None:
    (template,) = serving_templates(deployed)
    pause = container_of(template)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(settings_of(deployed)["PERFT_SHUTDOWN_TIMEOUT_S"])
    assert template["spec"]["terminationGracePeriodSeconds"] >= pause + drain + AFTER_SHUTDOWN_S
    for name, other in pod_templates(deployed):
        if "picker" in name:
            assert other["spec"]["terminationGracePeriodSeconds"] >= template["spec"]["terminationGracePeriodSeconds"]


def test_volumes_have_room_for_what_is_written(resources: list[Resource]) -> None:
    """The cache and, twice, every upload under way; home, /tmp and shared memory are writable."""
    settings = settings_of(resources)
    cache, uploads, adapter = (
        int(settings[f"PERFT_{name}"]) for name in ("ADAPTER_CACHE_BYTES", "MAX_UPLOADS", "MAX_ADAPTER_BYTES")
    )
    for template in serving_templates(resources):
        volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        mounts = {each["mountPath"]: each["name"] for each in container_of(template)["volumeMounts"]}
        (mount,) = (path for path in mounts if settings["PERFT_ADAPTER_CACHE"].startswith(f"{path}/"))
        assert bytes_of(volumes[mounts[mount]]["emptyDir"]["sizeLimit"]) >= cache + 2 * uploads * adapter
        limits = [each["emptyDir"].get("sizeLimit", "0Gi") for each in volumes.values() if "emptyDir" in each]
        on_disk = sum(map(bytes_of, limits)) - bytes_of(
            volumes.get("shm", {}).get("emptyDir", {}).get("sizeLimit", "0Gi")
        )
        assert bytes_of(container_of(template)["resources"]["requests"]["ephemeral-storage"]) >= on_disk
        assert {"/home/perft", "/tmp"} <= set(mounts)


def test_servers_run_without_rights(resources: list[Resource]) -> None:
    for name, template in pod_templates(resources):
        spec, security = template["spec"], container_of(template)["securityContext"]
        assert spec["securityContext"]["runAsNonRoot"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if "picker" not in name:
            user = spec["securityContext"]["runAsUser"]
            assert f"--uid {user} perft" in DOCKERFILE
            assert spec["securityContext"]["fsGroup"] == user and spec["automountServiceAccountToken"] is False


def test_keys_are_those_that_the_docs_make(resources: list[Resource]) -> None:
    """The Secrets that the manifests read, with their keys, against the commands in docs/many_servers.md."""
    text = (ROOT / "docs" / "many_servers.md").read_text(encoding="utf-8").replace("\\\n", " ")
    made = {
        secret: set(re.findall(r"--from-(?:file|literal)=(\w+)=", rest))
        for secret, rest in re.findall(r"create secret generic (\S+)(.*)", text)
    }
    assert set(made) == {"perft-keys", "perft-store"}
    used = set[tuple[str, str]]()
    for template in serving_templates(resources):
        for variable in container_of(template)["env"]:
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                used.add((reference["name"], reference["key"]))
        for volume in template["spec"]["volumes"]:
            if "secret" in volume:
                used |= {(volume["secret"]["secretName"], item["key"]) for item in volume["secret"]["items"]}
                # A Secret is mounted for root and the pod's group; others must not read it.
                assert volume["secret"]["defaultMode"] == 0o440
    for each in resources:
        if each["kind"] == "PodMonitor":
            for endpoint in each["spec"]["podMetricsEndpoints"]:
                if "authorization" in endpoint:
                    used.add(tuple(endpoint["authorization"]["credentials"][name] for name in ("name", "key")))
    assert used >= {("perft-keys", "api_keys"), ("perft-keys", "admin_key")}
    assert all(key in made[secret] for secret, key in used)


def test_images_are_targets_of_the_dockerfile(resources: list[Resource]) -> None:
    for template in serving_templates(resources):
        image = container_of(template)["image"]
        assert image.startswith("registry.example/perft-server:")
        assert f" AS {image.rpartition(':')[2]}\n" in DOCKERFILE


def metrics_of_ours() -> set[str]:
    registry = CollectorRegistry()
    registry.register(StateCollector(EventCounters(registry), lambda: StateSnapshot({}, 0)))
    return set(registry._names_to_collectors)


def test_what_is_scaled_by_is_measured(everything: dict[str, list[Resource]]) -> None:
    (trigger,) = named(everything["scaled"], "ScaledObject")["spec"]["triggers"]
    names = set(re.findall(r"perft_\w+", trigger["metadata"]["query"]))
    assert names == {"perft_adapter_requests_waiting"} <= metrics_of_ours()


def metrics_port(resources: list[Resource]) -> int:
    (template,) = serving_templates(resources)
    (port,) = (each["containerPort"] for each in container_of(template)["ports"] if each["name"] == "metrics")
    return int(port)


def picker_config(resources: list[Resource]) -> dict[str, Any]:
    (found,) = (
        each["data"] for each in resources if each["metadata"]["name"].startswith("perft-picker-") and "data" in each
    )
    return dict(yaml.safe_load(found["picker-config.yaml"]))


def test_the_picker_reads_the_metrics_where_they_are(behind_llm_d: list[Resource]) -> None:
    """It sends no key: the servers' metrics have a port of their own, which few reach."""
    (template,) = serving_templates(behind_llm_d)
    environment, port = environment_of(behind_llm_d, template), metrics_port(behind_llm_d)
    assert environment["PERFT_METRICS_BIND"] == f"0.0.0.0:{port}" and "PERFT_METRICS_KEY" not in environment
    parameters = {each["type"]: each.get("parameters") for each in picker_config(behind_llm_d)["plugins"]}
    assert parameters["metrics-data-source"]["port"] == port
    (endpoint,) = named(behind_llm_d, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics" and "authorization" not in endpoint
    (rule,) = named(behind_llm_d, "NetworkPolicy", "perft-metrics")["spec"]["ingress"]
    assert rule["ports"] == [{"port": "metrics", "protocol": "TCP"}]
    source = Path(loggers.__file__).read_text(encoding="utf-8")
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert f'"{name}"' in source
    assert "vllm:lora_requests_info" in metrics_of_ours()


def test_the_pickers_configuration_names_its_own_plugins(behind_llm_d: list[Resource]) -> None:
    config = picker_config(behind_llm_d)
    plugins = {each["type"] for each in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    references = {each["pluginRef"] for each in (*profile["plugins"], *config["requestHandler"]["parsers"])}
    assert references <= plugins
    assert {"lora-affinity-scorer", "queue-scorer", "kv-cache-utilization-scorer"} <= references
    (template,) = (template for name, template in pod_templates(behind_llm_d) if name == "perft-picker")
    pool = named(behind_llm_d, "InferencePool")["spec"]
    ports = {each["containerPort"] for each in container_of(template)["ports"]}
    assert pool["endpointPickerRef"]["port"]["number"] in ports
    (served,) = serving_templates(behind_llm_d)
    assert {each["number"] for each in pool["targetPorts"]} <= {
        each["containerPort"] for each in container_of(served)["ports"] if each["name"] == "http"
    }


def test_the_gateway_sends_every_route_somewhere_but_metrics_and_probes(behind_llm_d: list[Resource]) -> None:
    """What generates to the pool, the rest to the Service, as a Gateway matches paths: by whole segments."""
    rules = named(behind_llm_d, "HTTPRoute")["spec"]["rules"]

    def backend_of(path: str) -> str | None:
        for rule in rules:
            for match in (each["path"] for each in rule["matches"]):
                is_below = match["type"] == "PathPrefix" and path.startswith(match["value"].rstrip("/") + "/")
                if path == match["value"] or is_below:
                    (backend,) = rule["backendRefs"]
                    return str(backend["kind"])
        return None

    for route in ROUTES:
        path = re.sub(r"\{[^}]*\}", "any", route.path)
        if path in ("/metrics", "/health", "/ready"):
            assert backend_of(path) is None, path
        elif route.selects_model and path.startswith("/v1/"):
            assert backend_of(path) == "InferencePool", path
        else:
            assert backend_of(path) == "Service", path
    assert all(rule["timeouts"] == {"request": "0s"} for rule in rules)


def test_what_ray_serves_is_said_in_one_file(everything: dict[str, list[Resource]]) -> None:
    service = named(everything["ray"], "RayService")["spec"]
    config = yaml.safe_load((DEPLOYED / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(service["serveConfigV2"]) == config
    (application,) = config["applications"]
    import_path = application["import_path"]
    elsewhere = (path for path in DEPLOYED.rglob("*") if path.is_file() and path.name != "serve.yaml")
    assert not any(import_path in path.read_text(encoding="utf-8") for path in elsewhere)
    assert {each["kind"] for each in everything["ray"]} == {"ConfigMap", "RayService"}
    assert len([each for each in everything["ray"] if each["kind"] == "ConfigMap"]) == 1


def test_rays_head_and_workers_agree(everything: dict[str, list[Resource]]) -> None:
    templates = dict(pod_templates(everything["ray"]))
    switches = [
        {each["name"]: each.get("value") for each in container_of(template)["env"] if each["name"].startswith("RAY_")}
        for template in templates.values()
    ]
    assert switches[0] == switches[1] and len(switches[0]) == 3
    config = yaml.safe_load((DEPLOYED / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    for template in templates.values():
        assert {"name": "serve", "containerPort": config["http_options"]["port"]} in container_of(template)["ports"]
