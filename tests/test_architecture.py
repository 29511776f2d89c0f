"""Who may import whom. Dependencies point upward only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for top in ("trainer", "data_pipeline", "slurm") for path in (ROOT / top).rglob("*.py"))

ALLOWED = {
    "trainer.errors": (),
    "trainer.documents": (),
    "trainer.folders": ("trainer.errors",),
    "trainer.progress": (),
    "trainer.diffusion": ("trainer.diffusion",),
    "trainer.models": ("trainer.diffusion", "trainer.models", "trainer.errors", "trainer.folders"),
    "trainer.evaluation": (
        "trainer.diffusion",
        "trainer.evaluation",
        "trainer.documents",
        "trainer.errors",
        "trainer.folders",
        "trainer.generate",
        "trainer.progress",
        "trainer.restore",
        "data_pipeline",
    ),
    "trainer.evaluate": ("trainer", "data_pipeline", "slurm.cluster"),
    "trainer.evaluate_jobs": ("trainer", "slurm.cluster"),
    "data_pipeline": (
        "data_pipeline",
        "trainer.diffusion",
        "trainer.documents",
        "trainer.errors",
        "trainer.folders",
        "trainer.progress",
        "slurm.cluster",
    ),
    "slurm.cluster": ("trainer.documents", "trainer.errors"),
    "slurm": ("slurm", "trainer", "data_pipeline"),
}
"""For the modules under each name: the parts of this project that they may import. The rest of trainer may import all
of trainer and data_pipeline, and nothing of slurm. slurm.cluster is below all that is submitted: the preprocessor and
the evaluation submit themselves, and slurm's commands submit the trainer, by the same cluster files."""

ONLY = {
    "deepspeed": "trainer.engine",
    "pydantic": "trainer.config",
    "mlflow": "trainer.mlflow_store",
    "submitit": "slurm",
    "fsspec": "data_pipeline.storage",
}
"""Packages that one module, or one package, alone may import."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_upward(path: Path) -> None:
    module = name_of(path)
    allowed = next((a for part, a in ALLOWED.items() if within(module, (part,))), ("trainer", "data_pipeline"))
    for name in imports_of(path):
        if within(name, ("trainer", "data_pipeline", "slurm")):
            assert within(name, allowed), f"{module} may not import {name}"
        for package, owner in ONLY.items():
            if within(name, (package,)):
                assert within(module, (owner,)), f"only {owner} imports {package}"


def test_the_mathematics_imports_torch_alone() -> None:
    for path in FILES:
        if within(name_of(path), ("trainer.diffusion",)):
            for name in imports_of(path):
                top = name.split(".")[0]
                assert top in ("torch", "trainer") or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_there_are_no_import_cycles() -> None:
    names = {name_of(path) for path in FILES}
    graph = {
        name_of(path): {n for i in imports_of(path) for n in (i, i.rpartition(".")[0]) if n in names} for path in FILES
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for below in graph[name] - {"trainer", "data_pipeline", "trainer.diffusion", name}:
                visit(below, (*above, name))
            done.add(name)

    for name in sorted(names):
        visit(name, ())


@pytest.mark.parametrize(
    "path",
    [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))],
    ids=lambda p: p.name,
)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320
