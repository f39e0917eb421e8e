"""The structure of the package, from its syntax trees: where imports go, how large things are, which names are gone."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_soo"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go down this list only; parts that share a line are siblings and never import each other.
LAYERS = (
    ("cli", "prepare", "pretrain", "run"),
    ("doctor", "reproduce", "search"),
    ("plan",),
    ("bench",),
    ("domains",),
    ("bert", "glue", "lm", "squad", "vision"),
    ("runs", "text"),
    ("integrations",),
    ("registry",),
    ("preconditioners", "optimizers"),
    ("engine",),
    ("files", "machine", "outputs", "progress"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 45
MOST_FILES = 24
MOST_PUBLIC_NAMES = 629
MOST_LINES = 31_257


# Names that nothing is called any more; generic words only where they were misleading.
GONE = {
    "": {
        "Partial",
        "Moved",
        "Keeper",
        "Roster",
        "BareProducts",
        "bare_products",
        "together",
        "locate",
        "share_inverses",
        "share_directions",
        "owns",
        "works",
        "driven",
        "agreed",
        "refusal",
        "own_state",
    },
    "engine": {"place", "held", "wanted", "like", "bare", "pieces", "real", "Phase", "left", "idle"},
    "preconditioners": {"place", "held", "wanted", "like", "bare", "pieces", "real", "Phase", "left", "idle"},
    "bert": {"pieces", "real", "rows"},
    "glue": {"pieces", "real"},
    "squad": {"pieces", "real", "rows"},
    "vision": {"pieces", "real", "rows"},
}
GONE_MODULES = {
    "across", "learned", "sampled", "loss_kwargs", "bare_work", "cycle", "subject", "facts", "staging", "experiments"
}  # fmt: skip


@lru_cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_of(file: Path) -> str:
    """The dotted name below the package: "engine.state", "engine" for its __init__, "" for the package's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}
# Files that end with a row of the registry: one more method is no reason to raise the bounds on the whole package.
METHOD_FILES = {file for file in FILES if re.search(r"^METHODS? = ", file.read_text(encoding="utf-8"), re.MULTILINE)}


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, anywhere in it, and the lines."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            # a name of a module, or a module of a package
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("hf_soo.") in MODULES else str(node.module) for name in names]
        else:
            continue
        for name in names:
            if name == "hf_soo" or name.startswith("hf_soo."):
                yield name.removeprefix("hf_soo").removeprefix("."), node.lineno


def test_imports_go_down() -> None:
    up = {}
    for module, file in MODULES.items():
        here = module.partition(".")[0]
        for other, line in imports(file):
            there = other.partition(".")[0]
            if "" in (here, there) or here == there:  # the package's own file speaks for the registry
                continue
            assert there in LEVEL, f"{file}:{line}: hf_soo.{there} has no place in LAYERS"
            if LEVEL[here] >= LEVEL[there]:
                up[module, other] = f"{file.relative_to(ROOT)}:{line}"
    assert up == {}


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """The sets of files that reach each other."""
    reach = {start: set(targets) for start, targets in graph.items()}
    for middle in graph:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(groups, key=sorted)


def test_no_circles() -> None:
    graph = {module: {other for other, _ in imports(file) if other in MODULES} for module, file in MODULES.items()}
    assert circles(graph) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}}) == [{"b", "c"}, {"d"}]


@pytest.mark.parametrize("folder", ["hf_soo", "scripts", "tests"])
def test_nothing_imports_the_old_folders(folder: str) -> None:
    assert not list(PACKAGE.glob("tasks/*.py")) + list(PACKAGE.glob("experiments/*.py"))
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(tree(file)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            where = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            full = [f"{where}.{name}".strip(".") for name in names]
            old = [name for name in full if name.startswith(("hf_soo.tasks", "hf_soo.experiments"))]
            assert not old, f"{file.relative_to(ROOT)}:{node.lineno} imports {old[0]}"


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_files_and_functions_are_short() -> None:
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > MOST_FILE_LINES} == {}
    long = {
        f"{module}.{node.name}": length
        for module, file in MODULES.items()
        for node in functions(file)
        if (length := (node.end_lineno or 0) - node.lineno + 1 - signature_lines(node)) > MOST_FUNCTION_LINES
    }
    assert long == {}
    total, most = sum(count for module, count in lines.items() if MODULES[module] not in METHOD_FILES), MOST_LINES
    assert total <= most, f"{total} lines in the package without its methods, at most {most}"


def signature_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines before the body's first statement that is no docstring: what a reader has to follow begins there."""
    body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
    return body[0].lineno - node.lineno


def test_folders_are_small() -> None:
    count = Counter(file.parent.relative_to(ROOT).as_posix() for file in FILES)
    assert {name: n for name, n in count.items() if n > MOST_FILES} == {}


def test_public_names_are_few() -> None:
    public = [
        node.name
        for file in FILES
        if file not in METHOD_FILES
        for node in tree(file).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    most = MOST_PUBLIC_NAMES
    assert len(public) <= most, f"{len(public)} public functions and classes without the methods, at most {most}"


def defined(file: Path) -> Iterator[tuple[str, int]]:
    """Everything that a file gives a name that others can use: functions, classes, fields, attributes, constants."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        for statement in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.lineno


def test_old_names_are_gone() -> None:
    for module, file in MODULES.items():
        assert not any(module == old or module.endswith(f".{old}") for old in GONE_MODULES), module
        gone = GONE[""] | GONE.get(module.partition(".")[0], set())
        for name, line in defined(file):
            assert name not in gone, f"{file.relative_to(ROOT)}:{line} defines {name}, which has another name now"
