"""Mask codings against their definitions: the kernels, scikit-learn, exact linear algebra and finite differences."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from solq import kernels
from solq.models.solq.mask_coding import (
    DCTCoding,
    FlatCoding,
    PCACoding,
    SparseCoding,
    build_mask_coding,
    load,
    save,
)

SIZE = 32


def blobs(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """Smooth closed shapes (K, N, N) uint8 around the middle: a radius of a few random harmonics of the angle."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) * 2 / size - 1] * 2, indexing="ij")
    harmonic = torch.arange(1, 6)
    amplitude, phase = 0.2 * torch.rand(count, 5, generator=generator), 7 * torch.rand(count, 5, generator=generator)
    angle = torch.atan2(y, x)[..., None] * harmonic
    edge = 0.7 + (amplitude[:, None, None] * torch.cos(angle + phase[:, None, None])).sum(-1)
    return (torch.hypot(x, y) < edge).to(torch.uint8)


@pytest.fixture(scope="module")
def masks() -> Tensor:
    return blobs(400)


@pytest.fixture(scope="module")
def pca(masks: Tensor) -> PCACoding:
    coding = PCACoding(64, SIZE)
    coding.fit(masks)
    return coding


@pytest.fixture(scope="module")
def sparse(masks: Tensor) -> SparseCoding:
    pytest.importorskip("sklearn")
    coding = SparseCoding(64, SIZE)
    coding.fit(masks)
    return coding


def squared_error(coding: nn.Module, masks: Tensor) -> float:
    return float((coding.decode(coding.encode(masks)) - masks).square().mean())


def iou(coding: nn.Module, masks: Tensor) -> Tensor:
    decoded, masks = coding.binarize(coding.decode(coding.encode(masks))), masks.bool()
    return (decoded & masks).sum((1, 2)) / (decoded | masks).sum((1, 2))


def test_dct_is_the_kernels(masks: Tensor) -> None:
    coding = DCTCoding(64, SIZE)
    vectors = coding.encode(masks)
    torch.testing.assert_close(vectors, kernels.dct_encode(masks, 64))
    torch.testing.assert_close(coding.decode(vectors), kernels.dct_decode(vectors, SIZE))
    boxes = torch.tensor([[3.0, 4.5, 40.0, 30.0], [-5.0, 2.0, 20.0, 60.0]])
    pasted = coding.decode_paste(vectors[:2], boxes, (48, 56))
    assert pasted.dtype == torch.bool
    assert torch.equal(pasted, kernels.dct_decode_paste(vectors[:2], boxes, (48, 56), SIZE))
    assert not coding.state_dict()


def test_dct_is_cut_in_the_middle_of_each_mask() -> None:
    decoded = torch.tensor([[[0.0, 1.0], [0.4, 0.6]], [[-2.0, 10.0], [3.9, 4.1]]])
    assert DCTCoding(4, 2).binarize(decoded).tolist() == [[[False, True], [False, True]]] * 2


def test_pca_of_low_rank_masks_is_exact() -> None:
    tiles = torch.randint(0, 2, (200, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = tiles.repeat_interleave(8, 1).repeat_interleave(8, 2)  # 32×32 masks of rank 16
    coding = PCACoding(16, SIZE)
    coding.fit(masks)
    torch.testing.assert_close(coding.decode(coding.encode(masks)), masks.float(), atol=1e-4, rtol=0)
    assert torch.equal(coding.binarize(coding.decode(coding.encode(masks))), masks.bool())


def test_pca_is_the_best_linear_coding(masks: Tensor, pca: PCACoding) -> None:
    flat = masks.flatten(1).double()
    torch.testing.assert_close(pca.mean.double(), flat.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(64), atol=1e-5, rtol=0)
    dropped = torch.linalg.svdvals(flat - flat.mean(0))[64:]
    least = float(dropped.square().sum() / flat.numel())
    assert least <= squared_error(pca, masks) <= 1.001 * least
    assert squared_error(pca, masks) <= squared_error(DCTCoding(64, SIZE), masks)


def test_pca_depends_on_its_seed_alone(masks: Tensor, pca: PCACoding) -> None:
    again = PCACoding(64, SIZE)
    again.fit(masks)
    assert torch.equal(again.components, pca.components)


def test_pca_of_more_masks_than_one_chunk() -> None:
    masks = blobs(1500, 16)
    coding = PCACoding(20, 16)
    coding.fit(masks)
    flat = masks.flatten(1).double()
    largest = torch.linalg.svd(flat - flat.mean(0)).Vh[:20]
    overlap = torch.linalg.svdvals(largest.float() @ coding.components.T)  # cosines between the two subspaces
    assert overlap.min() > 0.999


def lasso(coding: SparseCoding, masks: Tensor, vectors: Tensor) -> float:
    """The objective of equation 3, written out."""
    error = masks.flatten(1).double() - vectors.double() @ coding.components.double()
    return float((error.square().sum(1) / 2 + float(coding.beta) * vectors.double().abs().sum(1)).mean())


def test_sparse_atoms_have_unit_norm(sparse: SparseCoding) -> None:
    torch.testing.assert_close(sparse.components.norm(dim=1), torch.ones(64))


def test_sparse_fit_lowers_the_objective(masks: Tensor, sparse: SparseCoding) -> None:
    start = SparseCoding(64, SIZE)
    start.fit(masks, epochs=1)
    assert lasso(sparse, masks, sparse.encode(masks)) < lasso(start, masks, start.encode(masks))


def test_sparse_encode_lowers_the_objective(masks: Tensor, sparse: SparseCoding) -> None:
    objectives = [lasso(sparse, masks, sparse.encode(masks, iterations)) for iterations in (0, 1, 10, 50, 300)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[-2]


def test_sparse_encode_is_optimal(masks: Tensor, sparse: SparseCoding) -> None:
    """A Lasso's solution: the gradient of the squared error is −β sign(v) where v ≠ 0, and within ±β elsewhere."""
    vectors = sparse.encode(masks)
    gradient = (vectors @ sparse.components - masks.flatten(1)) @ sparse.components.T
    assert 1 < (vectors != 0).float().sum(1).mean() < 40
    assert gradient.abs().max() < 1.02
    active = vectors.abs() > 1e-2
    torch.testing.assert_close(gradient[active], -vectors[active].sign(), atol=0.02, rtol=0)


def test_sparse_encode_is_scikit_learns_lasso(masks: Tensor, sparse: SparseCoding) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    expected = decomposition.sparse_encode(
        masks[:20].flatten(1).double().numpy(),
        sparse.components.double().numpy(),
        algorithm="lasso_cd",
        alpha=1.0,
        max_iter=100_000,
    )
    np.testing.assert_allclose(sparse.encode(masks[:20]).numpy(), expected, atol=0.05)


def test_sparse_fit_names_what_to_install(masks: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"pip install solq\[sparse\]"):
        SparseCoding(64, SIZE).fit(masks)


def test_flat_is_the_mask(masks: Tensor) -> None:
    coding = FlatCoding(SIZE)
    assert coding.num_coefficients == SIZE**2
    assert torch.equal(coding.binarize(coding.decode(coding.encode(masks))), masks.bool())


def test_flat_loss() -> None:
    generator = np.random.default_rng(0)
    predicted, target = generator.normal(size=(3, 784)), (generator.random((3, 784)) > 0.5) * 1.0
    expected = []
    for p, t in zip(predicted, target, strict=True):
        squares = sum((a - b) ** 2 for a, b in zip(p, t, strict=True))
        dice = (2 * np.dot(p, t) + 1) / (np.dot(p, p) + np.dot(t, t) + 1)
        expected.append(squares / 784 + 1 - dice)
    loss = FlatCoding().loss(torch.from_numpy(predicted), torch.from_numpy(target))
    np.testing.assert_allclose(loss.numpy(), expected)
    target = torch.from_numpy(target)
    torch.testing.assert_close(FlatCoding().loss(target, target), torch.zeros(3, dtype=torch.float64))


def test_l1_loss() -> None:
    predicted, target = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[0.0, 2.0], [0.5, 0.0]])
    assert DCTCoding(2, 8).loss(predicted, target).tolist() == [2.5, 0.0]


@pytest.mark.parametrize("coding", [DCTCoding(16, 4), FlatCoding(4)], ids=["l1", "l2 and dice"])
def test_loss_gradient(coding: DCTCoding | FlatCoding) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 2, (3, 16), generator=generator).double()
    assert torch.autograd.gradcheck(coding.loss, (predicted, target))


@pytest.mark.parametrize("coding_name", ["pca", "sparse"])
def test_decode_is_linear(coding_name: str, request: pytest.FixtureRequest) -> None:
    """A linear map is its own derivative: the gradient of ⟨w, decode(v)⟩ is the same for every v."""
    coding = request.getfixturevalue(coding_name)
    vectors = torch.randn(2, 64, requires_grad=True)
    weights = torch.randn(2, SIZE, SIZE)
    (gradient,) = torch.autograd.grad((weights * coding.decode(vectors)).sum(), vectors)
    expected = [[float((w.flatten() * component).sum()) for component in coding.components] for w in weights]
    torch.testing.assert_close(gradient, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("coding_name", "least"), [("pca", 0.95), ("sparse", 0.85)])
def test_round_trip_of_unseen_masks(coding_name: str, least: float, request: pytest.FixtureRequest) -> None:
    assert iou(request.getfixturevalue(coding_name), blobs(50, seed=1)).mean() > least


@pytest.mark.parametrize(("num_coefficients", "least"), [(64, 0.93), (256, 0.97)])
def test_round_trip_of_the_dct(num_coefficients: int, least: float) -> None:
    assert iou(DCTCoding(num_coefficients, 128), blobs(50, 128)).mean() > least


@pytest.mark.parametrize("coding_name", ["pca", "sparse"])
def test_vectors_are_float32_under_autocast(coding_name: str, masks: Tensor, request: pytest.FixtureRequest) -> None:
    coding = request.getfixturevalue(coding_name)
    vectors = coding.encode(masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coding.encode(masks), vectors)
        assert torch.equal(coding.decode(vectors), coding.decode(vectors.clone()))
        assert coding.decode(vectors).dtype == torch.float32


@pytest.mark.parametrize("coding_name", ["pca", "sparse"])
def test_decode_paste(coding_name: str, masks: Tensor, request: pytest.FixtureRequest) -> None:
    """In a box of the mask's own size at whole pixels, pasting copies; outside of the image it is cut off."""
    coding = request.getfixturevalue(coding_name)
    vectors = coding.encode(masks[:2])
    boxes = torch.tensor([[5.0, 3.0, 5.0 + SIZE, 3.0 + SIZE], [-4.0, 0.0, SIZE - 4.0, SIZE]])
    pasted = coding.decode_paste(vectors, boxes, (40, 50))
    expected = torch.zeros(2, 40, 50, dtype=torch.bool)
    binary = coding.binarize(coding.decode(vectors))
    expected[0, 3 : 3 + SIZE, 5 : 5 + SIZE] = binary[0]
    expected[1, :SIZE, : SIZE - 4] = binary[1, :, 4:]
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("coding_name", ["dct", "pca", "sparse", "flat"])
def test_no_masks(coding_name: str, request: pytest.FixtureRequest) -> None:
    coding = {"dct": DCTCoding(64, SIZE), "flat": FlatCoding(SIZE)}.get(coding_name)
    coding = coding or request.getfixturevalue(coding_name)
    vectors = coding.encode(torch.zeros(0, SIZE, SIZE, dtype=torch.uint8))
    assert vectors.shape == (0, coding.num_coefficients)
    assert coding.decode(vectors).shape == (0, SIZE, SIZE)
    assert coding.decode_paste(vectors, torch.zeros(0, 4), (20, 30)).shape == (0, 20, 30)
    assert coding.loss(vectors, vectors).shape == (0,)


@pytest.mark.parametrize("coding_name", ["pca", "sparse"])
def test_saved_and_loaded(
    coding_name: str, masks: Tensor, request: pytest.FixtureRequest, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = request.getfixturevalue(coding_name)
    path = tmp_path / "coding.safetensors"
    save(coding, path)

    def refuse(*_: object) -> None:
        raise AssertionError("a file was unpickled")

    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    loaded = load(path)
    assert type(loaded) is type(coding)
    assert torch.equal(loaded.encode(masks), coding.encode(masks))
    assert [file.name for file in tmp_path.iterdir()] == ["coding.safetensors"]


@pytest.mark.parametrize("coding_name", ["pca", "sparse"])
def test_a_checkpoint_carries_the_fitted_coding(
    coding_name: str, masks: Tensor, request: pytest.FixtureRequest
) -> None:
    fitted = request.getfixturevalue(coding_name)
    model = nn.ModuleDict({"mask_coding": build_mask_coding(coding_name, 64, SIZE)})
    model.load_state_dict(nn.ModuleDict({"mask_coding": fitted}).state_dict())
    expected = fitted.encode(masks)
    assert torch.equal(model["mask_coding"].encode(masks), expected)
    assert torch.equal(copy.deepcopy(model)["mask_coding"].encode(masks), expected)


@pytest.mark.parametrize("coding_name", ["pca", "sparse"])
def test_not_fitted(coding_name: str, masks: Tensor, tmp_path) -> None:
    coding = build_mask_coding(coding_name, 64, SIZE)
    message = f"{coding_name} mask coding is not fitted: run `solq fit-coding"
    with pytest.raises(RuntimeError, match=message):
        coding.encode(masks)
    with pytest.raises(RuntimeError, match=message):
        coding.decode(torch.zeros(1, 64))
    with pytest.raises(RuntimeError, match=message):
        save(coding, tmp_path / "coding.safetensors")
    copied = build_mask_coding(coding_name, 64, SIZE)
    copied.load_state_dict(coding.state_dict())
    with pytest.raises(RuntimeError, match=message):
        copied.encode(masks)


def test_files_that_are_no_coding(masks: Tensor, pca: PCACoding, tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "coding.safetensors"
    with pytest.raises(FileNotFoundError, match=r"coding\.safetensors"):
        load(path)
    save(pca, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"coding\.safetensors is not a complete safetensors file"):
        load(path)
    path.write_bytes(pickle.dumps({"mask_coding": "pca"}))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no fitted mask coding"):
        load(path)


def test_masks_that_cannot_fit(masks: Tensor) -> None:
    with pytest.raises(ValueError, match="10 masks cannot fit 64 coefficients"):
        PCACoding(64, SIZE).fit(masks[:10])
    with pytest.raises(ValueError, match=r"must be \(K, 16, 16\)"):
        PCACoding(64, 16).fit(masks)


def test_built_by_name() -> None:
    paper = {name: build_mask_coding(name) for name in ("dct", "pca", "sparse", "flat")}
    assert [coding.name for coding in paper.values()] == list(paper)
    assert {(c.num_coefficients, c.size) for name, c in paper.items() if name != "flat"} == {(256, 128)}
    assert (paper["flat"].num_coefficients, paper["flat"].size) == (784, 28)
    assert build_mask_coding("flat", 400, 20).size == 20
    with pytest.raises(ValueError, match="num_coefficients is 256, must be 784"):
        build_mask_coding("flat", 256)
    with pytest.raises(ValueError, match="num_coefficients is 300, must be 1 to 256"):
        build_mask_coding("dct", 300, 16)
    with pytest.raises(ValueError, match="mask coding is 'jpeg', must be"):
        build_mask_coding("jpeg")
