"""Which package may import which, read off the source with ast: imports inside functions count as well.

Inside server/ the table of docs/architecture.md is the rule.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from server import cli

ROOT = Path(__file__).parents[2]
PACKAGES = ("perft", "adapters", "server")
SERVER_MAY_USE = (
    "vllm.entrypoints.launchers",
    "vllm.entrypoints.serve.create_error_response",
    "vllm.engine.protocol.EngineClient",
    "vllm.engine.arg_utils.AsyncEngineArgs",
    "vllm.utils.argparse_utils.FlexibleArgumentParser",
    "vllm.utils.system_utils.decorate_logs",
    "vllm.lora.request.LoRARequest",
    "vllm.logger.configure_logging_from_args",
    "vllm.platforms.current_platform",
    "vllm.exceptions",
    "vllm.sampling_params.SamplingParams",
)
SERVER_MAY_USE_OF_OUR_ENGINE = (
    "perft.engine.plugin.KILL_SWITCH",
    "perft.engine.plugin.is_switched_off",
    "perft.engine.settings.SETTINGS_KEY",
    "perft.engine.settings.EngineSettings",
    "perft.engine.compatibility.SPECULATIVE_METHOD",
    "perft.engine.compatibility.environment_problems",
    "perft.engine.grammar_probe.install_validation",
    "perft.engine.grammar_probe.pack_setup",
    "perft.engine.peft_lora.lora_problem",
    "perft.engine.peft_lora.check_peft_lora",
    "perft.engine.scheduler.OUTPUT_INVALID",
)
ADAPTERS_MAY_USE = ("torch", "safetensors", "pydantic", "obstore", "perft", "adapters")


def within(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def imports_of(source: str, package: str = "", top_level: bool = False) -> set[str]:
    """The dotted names that `source` imports; `from a import b` gives `a.b`.

    `package` is what relative imports start from. With `top_level` only what runs when the module is imported.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found.update(module if alias.name == "*" else f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
        if not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return found


def files() -> list[str]:
    """Every source file of the three packages, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports_of_file(file: str) -> set[str]:
    return imports_of((ROOT / file).read_text(encoding="utf-8"), ".".join(Path(file).parts[:-1]))


def is_method(file: str) -> bool:
    return file.startswith("perft/") and not file.startswith("perft/engine/")


RULES: dict[str, tuple[Callable[[str], bool], Callable[[str, str], bool]]] = {
    "perft outside perft/engine imports no vllm, server, adapters, fastapi, engine": (
        lambda file: is_method(file) and file != "perft/command.py",  # the console script, which ends in server.cli
        lambda file, name: within(name, ("vllm", "server", "adapters", "fastapi", "starlette", "perft.engine")),
    ),
    "of the method, only perft/hf and perft/training import transformers": (
        is_method,
        lambda file, name: within(name, ("transformers",)) and not file.startswith(("perft/hf/", "perft/training/")),
    ),
    "adapters imports the standard library, torch, safetensors, pydantic, obstore and perft": (
        lambda file: file.startswith("adapters/"),
        lambda file, name: not within(name, (*sys.stdlib_module_names, *ADAPTERS_MAY_USE)),
    ),
    "adapters imports nothing of perft.engine": (
        lambda file: file.startswith("adapters/"),
        lambda file, name: within(name, ("perft.engine",)),
    ),
    "perft/engine imports no server and no fastapi": (
        lambda file: file.startswith("perft/engine/"),
        lambda file, name: within(name, ("server", "fastapi", "starlette")),
    ),
    "server imports of vllm only what its allow-list has": (
        lambda file: file.startswith("server/"),
        lambda file, name: within(name, ("vllm",)) and not within(name, SERVER_MAY_USE),
    ),
    "server imports of perft.engine only what its allow-list has": (
        lambda file: file.startswith("server/"),
        lambda file, name: within(name, ("perft.engine",)) and not within(name, SERVER_MAY_USE_OF_OUR_ENGINE),
    ),
    "perft/engine/pool.py imports no vllm": (
        lambda file: file == "perft/engine/pool.py",
        lambda file, name: within(name, ("vllm",)),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_arrow(rule: str) -> None:
    applies, forbidden = RULES[rule]
    seen = [file for file in files() if applies(file)]
    assert seen, "the rule looks at no file"
    broken = [f"{file}: {name}" for file in seen for name in sorted(imports_of_file(file)) if forbidden(file, name)]
    assert not broken, f"{rule}; found {broken}"


def test_only_the_engine_and_the_server_import_vllm() -> None:
    users = {file for file in files() if any(within(name, ("vllm",)) for name in imports_of_file(file))}
    assert users and all(file.startswith(("perft/engine/", "server/")) for file in users), users


def test_the_plugin_imports_only_the_standard_library() -> None:
    """vLLM swallows what goes wrong while it imports the plugin (perft/engine/plugin.py)."""
    for file in ("perft/engine/plugin.py", "perft/engine/__init__.py", "perft/__init__.py"):
        names = imports_of((ROOT / file).read_text(encoding="utf-8"), top_level=True)
        assert all(within(name, sys.stdlib_module_names) for name in names), (file, names)


BREAKING: dict[str, tuple[str, str]] = {
    "perft outside perft/engine imports no vllm, server, adapters, fastapi, engine": ("perft/x.py", "import vllm"),
    "of the method, only perft/hf and perft/training import transformers": (
        "perft/base_model.py", "import transformers.utils as u",
    ),
    "adapters imports the standard library, torch, safetensors, pydantic, obstore and perft": (
        "adapters/x.py", "import numpy",
    ),
    "adapters imports nothing of perft.engine": ("adapters/x.py", "from perft import engine"),
    "perft/engine imports no server and no fastapi": ("perft/engine/x.py", "def f():\n    from server import cli"),
    "server imports of vllm only what its allow-list has": ("server/x.py", "from vllm import LLM, SamplingParams"),
    "server imports of perft.engine only what its allow-list has": (
        "server/inference/engine_hook.py", "from perft.engine.manager import AdapterManager",
    ),
    "perft/engine/pool.py imports no vllm": ("perft/engine/pool.py", "import_module('vllm.config')"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_arrow_can_be_broken(rule: str) -> None:
    applies, forbidden = RULES[rule]
    file, source = BREAKING[rule]
    assert applies(file) and any(forbidden(file, name) for name in imports_of(source))


@pytest.mark.parametrize(
    ("source", "package", "top_level", "expected"),
    [
        ("import a.b, c", "", False, {"a.b", "c"}),
        ("from a.b import c, d as e", "", False, {"a.b.c", "a.b.d"}),
        ("from a import *", "", False, {"a"}),
        ("from . import x", "perft.engine", False, {"perft.engine.x"}),
        ("from ..y import x", "perft.engine", False, {"perft.y.x"}),
        ("def f():\n    import a", "", False, {"a"}),
        ("def f():\n    import a\nimport b", "", True, {"b"}),
        ("try:\n    import a\nexcept ImportError:\n    pass", "", True, {"a"}),
        ("if TYPE_CHECKING:\n    import a", "", True, {"a"}),
        ("class C:\n    import a\n    async def f(self):\n        import b", "", True, {"a"}),
        ("importlib.import_module('a.b')", "", False, {"a.b"}),
    ],
)
def test_imports_are_found(source: str, package: str, top_level: bool, expected: set[str]) -> None:
    assert imports_of(source, package, top_level) == expected


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            "server.client.live.top, server.client.chat.command",
            ("torch", "vllm", "safetensors", "transformers", "fastapi", "starlette", "uvicorn"),
        ),
        ("server.client.commands", ("torch", "vllm", "safetensors", "transformers", "fastapi", "starlette", "uvicorn")),
        (
            "server.commands.train, server.commands.convert, server.commands.inspect, server.commands.evaluate",
            ("torch", "vllm", "safetensors", "transformers", "fastapi", "uvicorn"),
        ),
        ("adapters.store, adapters.identity, adapters.names, adapters.ref, adapters.errors", ("torch", "safetensors")),
        ("adapters.format.files, adapters.format.config, adapters.format.strict_json", ("torch", "safetensors")),
        ("perft.config", ("torch", "adapters")),
        ("perft, perft.operator, perft.hf, perft.engine.pool", ("vllm", "server", "fastapi")),
        ("adapters.format.folder, adapters.archive.extract", ("vllm", "server", "fastapi", "transformers")),
        ("perft.base_model, perft.config, perft.reference, perft.operator", ("vllm", "transformers")),
        ("perft.engine.plugin", ("vllm", "torch", "pydantic")),
    ],
)
def test_what_an_import_loads(modules: str, forbidden: tuple[str, ...]) -> None:
    """In a process of its own. Without site-packages' start-up hooks nothing else can have loaded vLLM."""
    program = f"import sys, {modules}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = [name for name in done.stdout.split() if within(name, forbidden) or name.startswith("vllm")]
    assert done.stdout and not loaded, loaded


# --- inside server/

TABLE = ROOT / "docs" / "architecture.md"
MAX_DEPTH = 8
MAX_FILES = 9
MAX_CLASS_LINES = 250
TOP = ("cli", "errors")
"""Modules at the top of server/: the command reaches into `app` and `client`; every folder may import the errors."""


def rows_of_table() -> list[list[str]]:
    text = TABLE.read_text(encoding="utf-8")
    part = text[text.index("<!-- arrows:begin -->") : text.index("<!-- arrows:end -->")]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| `")
    ]
    return [[*row] for row in cells]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


FOLDERS = {quoted(row[0])[0]: row[2] for row in rows_of_table() if len(row) == 3}
RESERVED = [(quoted(row[0]), quoted(row[1])) for row in rows_of_table() if len(row) == 2]
SERVER_FILES = [file for file in files() if file.startswith("server/")]


def module_of(file: str) -> str:
    """`server/api/models.py` -> `api.models`; a package's __init__ is the package."""
    parts = Path(file).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def server_imports(file: str) -> set[str]:
    """The modules of server/ that a file imports, without `server.` in front."""
    modules = {module_of(other) for other in SERVER_FILES}
    found = set()
    for name in imports_of_file(file):
        if within(name, ("server",)):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in modules:
                parts.pop()
            found.add(".".join(parts))
    return found - {"", module_of(file)}


def breaks_arrow(file: str, imported: str) -> bool:
    """Whether the table forbids `file` to import the module `imported` of server/."""
    folder = module_of(file).split(".")[0]
    if folder in TOP:
        return False
    allowed = FOLDERS[folder]
    return not (allowed == "everything" or within(imported, (folder, "errors", *quoted(allowed))))


def breaks_reservation(file: str, imported: str) -> bool:
    """Whether `imported`, a dotted name from elsewhere, is reserved for others than `file`."""
    return (
        any(within(imported, reserved) and not within(module_of(file), users) for users, reserved in RESERVED)
        and imported not in HARMLESS
    )


HARMLESS = ("perft.engine.settings.SETTINGS_KEY", "perft.engine.settings.EngineSettings")


def test_the_table_names_the_folders_there_are() -> None:
    there = {path.name for path in (ROOT / "server").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(FOLDERS) == there and RESERVED


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_arrow_inside_the_server(folder: str) -> None:
    mine = [file for file in SERVER_FILES if module_of(file).split(".")[0] == folder]
    assert mine
    broken = [f"{file} -> {name}" for file in mine for name in sorted(server_imports(file)) if breaks_arrow(file, name)]
    broken += [f"{f} -> {name}" for f in mine for name in sorted(imports_of_file(f)) if breaks_reservation(f, name)]
    assert not broken, broken


def test_the_top_of_the_server_reaches_no_further_than_it_must() -> None:
    assert server_imports("server/errors.py") == set() and imports_of_file("server/__init__.py") == set()
    assert {name.split(".")[0] for name in server_imports("server/cli.py")} <= {"app", "errors", "hosting"}
    assert {module.split(".")[1] for module, _ in cli.COMMANDS.values()} == {"client", "commands"}
    assert not [name for name in imports_of_file("server/cli.py") if breaks_reservation("server/cli.py", name)]


def test_arrows_inside_the_server_can_be_broken() -> None:
    assert breaks_arrow("server/residency/state.py", "registry.registry")
    assert breaks_arrow("server/uploads/validate.py", "residency.scheduler")
    assert breaks_arrow("server/api/models.py", "middleware.drain")
    assert breaks_arrow("server/client/http.py", "api.dependencies")
    assert not breaks_arrow("server/app/plugin.py", "middleware.drain")
    assert breaks_reservation("server/registry/service.py", "fastapi.Request")
    assert breaks_reservation("server/auth/origin.py", "starlette.datastructures.Headers")
    assert breaks_reservation("server/residency/scheduler.py", "perft.engine.scheduler.OUTPUT_INVALID")
    assert not breaks_reservation("server/inference/engine_hook.py", "vllm.exceptions.VLLMError")


def depths() -> dict[str, list[str]]:
    """The longest chain of imports from every module of server/. Raises AssertionError for a cycle."""
    graph = {module_of(file): server_imports(file) for file in SERVER_FILES}
    longest: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...] = ()) -> list[str]:
        assert module not in above, f"an import cycle: {' -> '.join([*above, module])}"
        if module not in longest:
            below = [chain(name, (*above, module)) for name in graph[module]]
            longest[module] = [module, *max(below, key=len, default=[])]
        return longest[module]

    for module in graph:
        chain(module)
    return longest


def test_no_chain_of_imports_is_long_and_none_is_a_cycle() -> None:
    deepest = max(depths().values(), key=len)
    assert len(deepest) <= MAX_DEPTH, " -> ".join(deepest)


def test_no_folder_of_the_server_is_a_drawer() -> None:
    for folder in {(ROOT / file).parent for file in SERVER_FILES}:
        found = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
        assert len(found) <= MAX_FILES, (folder, found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_class_is_long(package: str) -> None:
    for file in files():
        if file.startswith(f"{package}/"):
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                    lines = node.end_lineno - node.lineno + 1
                    assert lines <= MAX_CLASS_LINES, f"{file}: {node.name} has {lines} lines"


def test_no_status_code_is_known_below_the_wire() -> None:
    """A number like an HTTP status, or http.HTTPStatus, in a folder that must not know them."""
    for file in SERVER_FILES:
        folder = module_of(file).split(".")[0]
        if folder in ("api", "console", "middleware", "app", "client", "demo", "evaluation", "metrics", "settings"):
            continue
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        numbers = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not numbers & {400, 401, 403, 404, 405, 408, 409, 410, 413, 415, 429, 500, 503, 507}, file
        assert not any("HTTPStatus" in name for name in imports_of_file(file)), file
