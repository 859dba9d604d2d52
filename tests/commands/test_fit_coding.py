"""The command that fits a mask coding to a training set."""

from pathlib import Path

import pytest
import torch

from solq.commands.fit_coding import fit_coding, read_masks
from solq.commands.settings import FitCodingConfig
from solq.data.annotations import split_paths
from solq.data.coco import CocoDataset
from solq.data.shapes import generate
from solq.data.transforms import EvalTransform
from solq.models.solq.mask_coding import PCACoding, SparseCoding, load


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=30, num_val=2, image_size=64)
    return root


@pytest.mark.parametrize(("name", "coding_class"), [("pca", PCACoding), ("sparse", SparseCoding)])
def test_fit_to_a_dataset(name: str, coding_class: type, shapes: Path, tmp_path: Path, capsys) -> None:
    if name == "sparse":
        pytest.importorskip("sklearn")
    output = tmp_path / "new" / "coding.safetensors"
    path = fit_coding(FitCodingConfig(shapes, name, output, num_coefficients=24, size=32, max_masks=60, device="cpu"))
    assert path == output
    coding = load(path)
    assert isinstance(coding, coding_class)
    assert (coding.num_coefficients, coding.size) == (24, 32)
    printed = capsys.readouterr().out
    assert "fitted to 60 masks" in printed
    assert 0.7 < float(printed.split("decoded: ")[1]) <= 1


def test_masks_are_the_datasets_in_an_order_of_the_seed(shapes: Path) -> None:
    dataset = CocoDataset(*split_paths(shapes, "train2017"), EvalTransform(), mask_size=32, train=True)
    everything = torch.cat([dataset[index][1]["masks"] for index in range(len(dataset))])
    masks = read_masks(dataset, 10_000, 0)
    assert masks.dtype == torch.uint8
    assert not torch.equal(masks, everything)
    assert sorted(masks.flatten(1).tolist()) == sorted(everything.flatten(1).tolist())
    assert torch.equal(read_masks(dataset, 20, 0), masks[:20])


def test_too_few_masks(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="10 masks cannot fit 24 coefficients"):
        fit_coding(
            FitCodingConfig(shapes, "pca", tmp_path / "x", num_coefficients=24, size=32, max_masks=10, device="cpu")
        )
    assert not list(tmp_path.iterdir())
