"""The rules of docs/architecture.md that a machine can check: who may import whom, no Ray below the engine, no long module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dragonclf"

# Each layer may import itself, those before it, and nothing after it.
LAYERS = [
    {"storage"},
    {"config"},
    {"data"},
    {"model"},
    {"evaluate"},
    {"outcomes", "busy", "session", "progress", "tracking"},
    {"engine"},
    {"train"},
    {"verbs"},
    {"learner", "scores", "options", "demo", "cli", "__main__", "__init__"},
]
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
WITHOUT_RAY = ["config", "storage", "data", "model", "evaluate"]
MAX_LINES = 400


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of dragonclf that a module imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dragonclf":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dragonclf."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dragonclf.")}
    return found


def test_every_part_has_its_layer():
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} == set(LAYER_OF)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    own = part_of(path)
    later = {part for part in imported_parts(path) if LAYER_OF[part] > LAYER_OF[own]}
    assert not later, f"{own} is below {later}: move what it needs down, or the caller up"


def test_lower_layers_load_without_ray():
    """In a process of its own, with Ray made impossible to import."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if part_of(path) in WITHOUT_RAY
    ]
    assert "dragonclf.evaluate.report" in names
    program = (
        f"import sys; sys.modules['ray'] = None\nimport importlib\nfor name in {names!r}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_long(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_are_thin(path: Path):
    assert len(path.read_text().splitlines()) < 100
