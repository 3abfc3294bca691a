"""Which package may import which, read off the source with ast: imports inside functions count as well."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("perft", "adapters", "server")
SERVER_MAY_USE = (
    "vllm.entrypoints.launchers",
    "vllm.engine.protocol.EngineClient",
    "vllm.engine.arg_utils.AsyncEngineArgs",
    "vllm.utils.argparse_utils.FlexibleArgumentParser",
    "vllm.lora.request.LoRARequest",
    "vllm.logger.configure_logging_from_args",
    "vllm.exceptions",
    "vllm.sampling_params.SamplingParams",
)
SERVER_MODULES_WITH_VLLM = ("arguments", "plugin", "engine_hook", "serve", "vllm", "warm_up")
SERVER_MAY_USE_OF_OUR_ENGINE = (
    "perft.engine.plugin.KILL_SWITCH",
    "perft.engine.plugin.is_switched_off",
    "perft.engine.settings.SETTINGS_KEY",
    "perft.engine.settings.EngineSettings",
    "perft.engine.compatibility.environment_problems",
    "perft.engine.peft_lora.lora_problem",
    "perft.engine.peft_lora.peft_lora_violations",
    "perft.engine.scheduler.OUTPUT_INVALID",
)
ADAPTERS_MAY_USE = ("torch", "safetensors", "pydantic", "perft", "adapters")


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
        is_method,
        lambda file, name: within(name, ("vllm", "server", "adapters", "fastapi", "starlette", "perft.engine")),
    ),
    "of the method, only perft/hf.py imports transformers": (
        is_method,
        lambda file, name: within(name, ("transformers",)) and file != "perft/hf.py",
    ),
    "adapters imports the standard library, torch, safetensors, pydantic and perft": (
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
    "of the server, only its five modules that touch vllm import it or perft.engine": (
        lambda file: file.startswith("server/") and Path(file).stem not in SERVER_MODULES_WITH_VLLM,
        lambda file, name: within(name, ("vllm", "perft.engine")),
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
    "of the method, only perft/hf.py imports transformers": ("perft/base_model.py", "import transformers.utils as u"),
    "adapters imports the standard library, torch, safetensors, pydantic and perft": ("adapters/x.py", "import numpy"),
    "adapters imports nothing of perft.engine": ("adapters/x.py", "from perft import engine"),
    "perft/engine imports no server and no fastapi": ("perft/engine/x.py", "def f():\n    from server import cli"),
    "server imports of vllm only what its allow-list has": ("server/x.py", "from vllm import LLM, SamplingParams"),
    "of the server, only its five modules that touch vllm import it or perft.engine": (
        "server/registry/service.py", "from perft.engine.scheduler import OUTPUT_INVALID",
    ),
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
        ("server.client.commands", ("torch", "vllm", "safetensors", "transformers", "fastapi", "starlette", "uvicorn")),
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
