"""Who may import whom, and what ``import orthogonium`` needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import orthogonium

ROOT = Path(orthogonium.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A part may import itself and what stands in earlier rows. Parts of one row do not know each other.
ORDER = [
    {"_version", "_checks", "_randomness", "_reports", "_selection"},
    {"linalg"},
    {"parametrizations"},
    {"reparametrizers", "initialization"},
    {"layers"},
    {"certification"},
    {"surgery", "diagnostics", "models", "optim", "testing"},
    {"training"},
    {"cli"},
]
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}
REQUIRED = {"torch"}  # at import of the library; the rest belongs to extras
OPTIONAL = {"sklearn", "matplotlib", "rich", "safetensors", "numpy", "hypothesis"}
NEEDS_EXTRAS = {"training", "cli", "__main__"}  # parts that may import extras at the top


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(node: ast.AST, package: tuple[str, ...]):
    """Every module that ``node`` imports, absolute, with the statement."""
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            yield from ((alias.name, statement) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) + 1 - statement.level] if statement.level else ()
            base = ".".join((*above, *([statement.module] if statement.module else [])))
            if base == "orthogonium":  # `from orthogonium import linalg` imports the part
                yield from ((f"orthogonium.{alias.name}", statement) for alias in statement.names)
            else:
                yield base, statement


def parsed(file: Path):
    return ast.parse(file.read_text()), file.relative_to(ROOT.parent).parts[:-1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_look_down_only(file):
    tree, package = parsed(file)
    part = part_of(file)
    if part in {"__init__", "__main__"}:
        return
    assert part in RANK, f"{part} has no place in the order: add it"
    for name, statement in imports(tree, package):
        if name.split(".")[0] != "orthogonium":
            continue
        target = name.split(".")[1] if "." in name else ""
        assert target in RANK, f"line {statement.lineno}: import the part that defines the name, not the package"
        allowed = target == part or RANK[target] < RANK[part]
        assert allowed, f"line {statement.lineno}: {part} must not import {target}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_stand_at_the_top_unless_optional(file):
    tree, package = parsed(file)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    for function in functions:
        for name, statement in imports(function, package):
            optional = name.split(".")[0] in OPTIONAL
            assert optional, f"line {statement.lineno}: import {name} belongs to the top of the file"


def for_types(node: ast.AST) -> bool:
    """Whether it is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_torch_is_required(file):
    tree, package = parsed(file)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) or for_types(f) for n in ast.walk(f)}
    for name, statement in imports(tree, package):
        top = name.split(".")[0]
        if top == "orthogonium" or top in sys.stdlib_module_names or top in REQUIRED or id(statement) in inside:
            continue
        assert part_of(file) in NEEDS_EXTRAS, f"line {statement.lineno}: {top} is an extra"


def test_no_circles_between_files():
    edges = {}
    names = {".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    for module, file in names.items():
        tree, package = parsed(file)
        targets = {name for name, _ in imports(tree, package) if name in names and name != module}
        edges[module] = {t for t in targets if names[t].name != "__init__.py" or t not in ".".join(package)}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for target in sorted(edges[module]):
                visit(target)
            path.pop()
            done.add(module)

    for module in names:
        visit(module)


def test_import_needs_torch_alone():
    """In a fresh interpreter in which every optional package refuses to be imported."""
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {sorted(OPTIONAL | {"scipy", "pandas", "geotorch", "deel"})!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import orthogonium, torch
layer = orthogonium.OrthoLinear(3, 3)
layer(torch.ones(3)).sum().backward()
for name in orthogonium.__all__:
    getattr(orthogonium, name)
print('fine')
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert result.stdout.strip() == "fine", result.stderr
