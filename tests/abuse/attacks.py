"""All attacks, found in the modules of this folder. EXPECTED: the ends that an attack may have when it runs alone."""

import importlib
import pkgutil

import tests.abuse
from tests.abuse.target import Attack

OURS = ("attacks", "conftest", "soak", "target", "witness")
MODULES = [
    importlib.import_module(f"tests.abuse.{found.name}")
    for found in pkgutil.iter_modules(tests.abuse.__path__)
    if not found.name.startswith("test_") and found.name not in OURS
]
ATTACKS: dict[str, Attack] = {name: attack for module in MODULES for name, attack in module.ATTACKS.items()}
EXPECTED: dict[str, set[str]] = {
    name: ends for module in MODULES for name, ends in getattr(module, "EXPECTED", {}).items()
}
