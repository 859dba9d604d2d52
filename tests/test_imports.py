"""Imports point only downwards through the layers of the package, form no circle, and are light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

# From the bottom. A name stands for a module, or a folder with all modules in it; the longest that fits counts.
LAYERS = [
    ["solq", "solq.errors", "solq.files", "solq.progress", "solq.devices"],
    ["solq.kernels"],
    ["solq.drop_in"],
    ["solq.data"],
    ["solq.drawing"],
    ["solq.detections"],
    ["solq.models"],
    ["solq.weights", "solq.evaluation", "solq.visualize", "solq.predictor"],
    ["solq.training", "solq.matcher", "solq.criterion"],
    ["solq.commands", "solq.__main__"],
    ["train"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
LAZY_NAMES = ["solq"]  # offers public names of upper layers, each imported on its first use


def layer(module: str) -> int:
    """Return the number of the layer of a module, from 0 at the bottom."""
    parts = module.split(".")
    parents = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(LAYER_OF[name] for name in parents if name in LAYER_OF and (name != "solq" or name == module))


def modules(root: Path) -> dict[str, Path]:
    """Return the files of solq/ and train.py by the names of their modules."""
    files = [*(root / "solq").rglob("*.py"), root / "train.py"]
    names = [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def imports(module: str, source: str, known: set[str], is_package: bool) -> Iterator[str]:
    """Yield the modules of `known` that a module imports anywhere: at its top, in functions, for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) + is_package - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in known or base in known:
                    yield name if name in known else base


def graph(root: Path) -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    files = modules(root)
    return {
        name: set(imports(name, file.read_text(), set(files), file.name == "__init__.py")) - {name}
        for name, file in files.items()
    }


def upward(edges: dict[str, set[str]]) -> list[str]:
    """List the imports that point to a higher layer."""
    return sorted(
        f"{module} imports {imported}"
        for module, targets in edges.items()
        if module not in LAZY_NAMES
        for imported in targets
        if layer(imported) > layer(module)
    )


def circle(edges: dict[str, set[str]]) -> list[str]:
    """List the modules that lie on or behind a circle of imports; none if there is no circle."""
    left = {module: set(targets) for module, targets in edges.items() if module not in LAZY_NAMES}
    while True:
        done = {module for module, targets in left.items() if not targets & left.keys()}
        if not done:
            return sorted(left)
        left = {module: targets for module, targets in left.items() if module not in done}


def test_imports_point_downwards() -> None:
    assert upward(graph(REPOSITORY)) == []


def test_no_circle_of_modules() -> None:
    assert circle(graph(REPOSITORY)) == []


def test_kernels_import_nothing_else_of_the_package() -> None:
    """The folder can be copied into another project."""
    foreign = {
        f"{module} imports {imported}"
        for module, targets in graph(REPOSITORY).items()
        if module.startswith("solq.kernels")
        for imported in targets
        if not imported.startswith("solq.kernels")
    }
    assert foreign == set()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("solq", {"torch", "triton", "scipy", "tensorboard", "timm", "pycocotools", "torchvision", "tyro", "rich"}),
        ("solq.kernels", {"PIL", "scipy", "tensorboard", "timm", "pycocotools", "torchvision", "tyro", "rich"}),
        ("train", {"scipy", "tensorboard", "timm", "faster_coco_eval"}),
    ],
)
def test_imports_are_light(module: str, heavy: set[str]) -> None:
    """SciPy is imported where a CPU assignment runs, TensorBoard where a log is written, timm where a Swin is built."""
    program = f"import sys, {module}; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert heavy & set(shown.stdout.split()) == set()


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("solq/data/a.py", "from solq.models.base import X", "solq.data.a imports solq.models.base"),
        ("solq/data/a.py", "def f():\n    from solq.training import a", "solq.data.a imports solq.training.a"),
        ("solq/data/a.py", "if TYPE_CHECKING:\n    import solq.commands.a", "solq.data.a imports solq.commands.a"),
        ("solq/data/a.py", "from ..predictor import Predictor", "solq.data.a imports solq.predictor"),
        (
            "solq/kernels/family/__init__.py",
            "from ... import detections",
            "solq.kernels.family imports solq.detections",
        ),
        ("solq/commands/a.py", "from train import main", "solq.commands.a imports train"),
    ],
)
def test_an_upward_import_is_found(module: str, line: str, found: str, tmp_path: Path) -> None:
    package(tmp_path, {module: line})
    assert upward(graph(tmp_path)) == [found]


@pytest.mark.parametrize(
    "files",
    [
        {"solq/data/a.py": "from solq.data.b import B", "solq/data/b.py": "def f():\n    from solq.data.a import A"},
        {
            "solq/data/a.py": "from . import b",
            "solq/data/b.py": "from . import c",
            "solq/data/c.py": "from .a import A",
        },
    ],
)
def test_a_circle_is_found(files: dict[str, str], tmp_path: Path) -> None:
    package(tmp_path, files)
    assert upward(graph(tmp_path)) == []
    assert circle(graph(tmp_path)) == sorted(file.removesuffix(".py").replace("/", ".") for file in files)


def package(root: Path, files: dict[str, str]) -> None:
    """Write a package of a few empty modules, and the given ones."""
    others = ["data/a", "models/base", "training/a", "commands/a", "predictor", "detections", "kernels/family/__init__"]
    for name in ["train.py", "solq/__init__.py", *(f"solq/{other}.py" for other in others)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, source in files.items():
        (root / name).write_text(source)
