"""Without a GPU the Triton kernels run in the interpreter, on CPU tensors."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which `solq.kernels` does

from solq.data import shapes
from solq.kernels import use_backend

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _reference_on_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Outside tests/kernels the interpreter would only be slow: CPU tensors are served by the reference there."""
    if torch.cuda.is_available() or "kernels" in request.path.parts:
        yield
    else:
        with use_backend("reference"):
            yield


@pytest.fixture
def coco_tiny() -> Path:
    """A folder in COCO's layout with real images; its tests are skipped where it is absent."""
    folder = Path(os.environ.get("SOLQ_COCO_TINY", REPOSITORY.parent / "shared" / "data" / "coco-tiny"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is not there (set SOLQ_COCO_TINY)")
    return folder


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shapes dataset of ten training and three validation images; its tests must not change it."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, num_train=10, num_val=3, image_size=64)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
