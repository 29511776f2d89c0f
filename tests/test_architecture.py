"""Who may import whom: packages, folders and files point one way. Imports within functions count, and so do names of
modules in strings, which import_module and `python -m` take."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ambient_core", "data_pipeline", "trainer", "slurm")
"""From the lowest to the highest: each may import those before it, and itself."""
FILES = sorted(path for top in PACKAGES for path in (ROOT / top).rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})

ONLY = {
    "deepspeed": "trainer.engine",
    "pydantic": "trainer.config",
    "mlflow": "trainer.tracking",
    "submitit": "slurm",
    "fsspec": "ambient_core.storage",
}
"""Packages that one module, or one folder, alone may import."""

COMMANDS = {
    "cli",
    "completion",
    "doctor",
    "evaluate",
    "export",
    "init",
    "plan",
    "quickstart",
    "sample",
    "study",
    "train",
}
"""What trainer's root holds."""

BY_NAME = {
    "trainer.cli": "the console script, which names the commands of every package and imports one",
    "trainer.study": "submits its runs by a process of its own, `python -m slurm.submit`",
}
"""Modules that name a higher package's module in a string, and why they may."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named_in_strings(path: Path) -> Iterator[str]:
    """Modules of this project that a whole string names, such as import_module takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES - set(PACKAGES):
            yield node.value


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def module_of(name: str) -> str | None:
    """The project's module that an imported name is, or is in; None for other projects'."""
    return name if name in MODULES else parent if (parent := name.rpartition(".")[0]) in MODULES else None


GRAPH = {name_of(path): {m for n in imports_of(path) if (m := module_of(n)) and m != name_of(path)} for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_point_one_way(path: Path) -> None:
    module = name_of(path)
    height = {package: i for i, package in enumerate(PACKAGES)}
    for name in imports_of(path):
        for package, owner in ONLY.items():
            assert not within(name, package) or within(module, owner), f"only {owner} imports {package}"
    strings = set() if module in BY_NAME else set(named_in_strings(path))
    for name in GRAPH[module] | strings:
        assert height[name.split(".")[0]] <= height[module.split(".")[0]], f"{module} may not import {name}"


@pytest.mark.parametrize("module", BY_NAME)
def test_those_that_name_a_higher_module_still_do(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert any(within(name, "slurm") for name in named_in_strings(path))


def cycle_in(graph: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """A way from a node back to it, or nothing."""
    done: set[str] = set()

    def visit(node: str, above: tuple[str, ...]) -> tuple[str, ...]:
        if node in above:
            return (*above[above.index(node) :], node)
        if node not in done:
            for below in sorted(graph.get(node, ())):
                if found := visit(below, (*above, node)):
                    return found
            done.add(node)
        return ()

    return next((found for node in sorted(graph) if (found := visit(node, ()))), ())


def test_a_cycle_is_found() -> None:
    assert cycle_in({"a": "b", "b": "cd", "c": "", "d": "b"}) == ("b", "d", "b")
    assert cycle_in({"a": "bc", "b": "c", "c": ""}) == ()


def test_files_have_no_import_cycle() -> None:
    assert not (found := cycle_in(GRAPH)), " -> ".join(found)


def test_folders_have_no_import_cycle() -> None:
    """A package's `__init__` has what all its folders may see, such as the version, and is below them."""
    folders = {name_of(folder / "__init__.py") for folder in FOLDERS}

    def folder_of(module: str) -> str:
        return f"{module}.__init__" if module in folders else module.rpartition(".")[0]

    graph: dict[str, set[str]] = {}
    for module, names in GRAPH.items():
        graph.setdefault(folder_of(module), set()).update(
            folder_of(n) for n in names if folder_of(n) != folder_of(module)
        )
    assert not (found := cycle_in(graph)), " -> ".join(found)


def test_the_mathematics_imports_torch_alone() -> None:
    """And of this project batches and seeds, which are torch alone, too."""
    lower = [ROOT / "ambient_core" / f"{name}.py" for name in ("batch", "seeding")]
    allowed = ("trainer.diffusion", *map(name_of, lower))
    for path in [*(ROOT / "trainer" / "diffusion").rglob("*.py"), *lower]:
        for name in imports_of(path):
            ours = name.split(".")[0] in PACKAGES
            known = (
                any(within(name, parent) for parent in allowed)
                if ours
                else name.split(".")[0] in {"torch", *sys.stdlib_module_names}
            )
            assert known, f"{path} imports {name}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_says_what_it_holds_and_is_not_a_heap(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert text, "the opening line is missing"
    assert re.search(r"imports?", text, re.IGNORECASE), "it does not say who may import whom"
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 13


MODELS = ("trainer.models", "trainer.config")
"""Where kinds of models are told apart: in their own files, and where configurations are read."""


def classes_of(*modules: str) -> Iterator[ast.ClassDef]:
    for path in FILES:
        if any(within(name_of(path), module) for module in modules):
            yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))


MODEL_CLASSES = {node.name for node in classes_of("trainer.models", "data_pipeline.latents.tokens")}
"""Among them the configurations, networks and adapters of all kinds, and what captions become."""
MODEL_KINDS = {
    node.value.value
    for class_ in classes_of("trainer.models")
    for node in class_.body
    if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant) and ast.unparse(node.target) == "kind"
}


def told_apart(tree: ast.AST) -> Iterator[str]:
    """Kinds of models that code asks for: by isinstance, by a type, in a match, or by the name of the kind."""
    for node in ast.walk(tree):
        looked_at: list[ast.AST] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            looked_at += node.args[1:]
        if isinstance(node, ast.MatchClass):
            looked_at.append(node.cls)
        if isinstance(node, ast.Compare):
            looked_at += (node.left, *node.comparators)
        parts = [part for root in looked_at for part in ast.walk(root)]
        named = {
            part.id if isinstance(part, ast.Name) else part.attr
            for part in parts
            if isinstance(part, ast.Name | ast.Attribute)
        }
        kinds = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        if named & MODEL_CLASSES or (isinstance(node, ast.Compare) and kinds & MODEL_KINDS):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "path", [path for path in FILES if not any(within(name_of(path), m) for m in MODELS)], ids=name_of
)
def test_a_model_is_asked_not_told_apart(path: Path) -> None:
    """What depends on the kind of a model is asked of its adapter, so a new kind is a file in trainer/models/."""
    tree = ast.parse(path.read_text())
    assert not list(told_apart(tree)), "ask config.model.adapter"


def test_what_tells_models_apart_is_found() -> None:
    assert {"unet2d", "dit", "sdxl"} == MODEL_KINDS
    assert {"UNet2DConfig", "DiTConfig", "SDXLConfig", "Tokens", "TextRows", "EncodedText"} <= MODEL_CLASSES
    for code in (
        "isinstance(config.model, SDXLConfig) and x",
        "isinstance(text, str | tokens.Tokens)",
        "type(model) is DiTConfig",
        "config.model.kind == 'sdxl'",
        "data['model']['kind'] in ('dit', 'sdxl')",
        "match m:\n case UNet2DConfig(): pass",
    ):
        assert list(told_apart(ast.parse(code))), code
    assert not list(
        told_apart(ast.parse("isinstance(x, str) and guide.model.kind != run.model.kind and p.kind == 've'"))
    )


def test_trainers_root_holds_the_commands_alone() -> None:
    found = {path.stem for path in (ROOT / "trainer").glob("*.py")} - {"__init__"}
    assert found == COMMANDS
