"""Makes the JSON schemas in this folder from custom resource definitions.

    python integration/schemas/reduce.py FILE.yaml SOURCE VERSION

SOURCE says where FILE is from. Left out are descriptions, `status`, and the templates of pods and services, which the
test checks with Kubernetes' own schemas. As the API server would drop them, fields that no schema names are refused.
Rules in CEL (x-kubernetes-validations) are not checked.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

PODS_AND_SERVICES = {"template", "headService", "serveService"}
ANYTHING = {"type": "object"}


def reduced(schema: Any, is_map: bool = False) -> Any:
    """The JSON schema that a schema of a definition stands for. is_map: its keys are names of fields."""
    if isinstance(schema, list):
        return [reduced(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if is_map:
        return {
            name: ANYTHING if name in PODS_AND_SERVICES and "properties" in value else reduced(value)
            for name, value in schema.items()
        }
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        name: reduced(value, is_map=name == "properties")
        for name, value in schema.items()
        if not name.startswith("x-kubernetes-") and name not in ("description", "default", "format", "nullable")
    }
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        return {"anyOf": [kept, {"type": "null"}]}
    return kept


def main(file: Path, source: str, version: str) -> None:
    definition = yaml.safe_load(file.read_text(encoding="utf-8"))
    kind, group = definition["spec"]["names"]["kind"], definition["spec"]["group"]
    (found,) = (each for each in definition["spec"]["versions"] if each["name"] == version)
    schema = found["schema"]["openAPIV3Schema"]
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = ANYTHING
    comment = f"{kind} of {group}/{version}, from {source}, Apache License 2.0; shortened by reduce.py beside this file"
    out = file_of(f"{group}/{version}", kind)
    out.write_text(json.dumps({"$comment": comment, **reduced(schema)}, separators=(",", ":")) + "\n")
    print(f"{out}: {out.stat().st_size} bytes")


def file_of(api_version: str, kind: str) -> Path:
    """Where the schema of a kind is."""
    return Path(__file__).parent / f"{kind.lower()}-{api_version.replace('/', '-')}.json"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
