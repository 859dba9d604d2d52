"""Images of every kind in, detections of the upright original out, whatever happens to their neighbors."""

import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import as_tensor, picture
from torch import Tensor, nn

import solq
from solq.detections import Detections, ModelMeta
from solq.models.solq.model import SOLQ
from solq.predictor import Predictor, map_ahead


@pytest.fixture(scope="module")
def model() -> SOLQ:
    """Untrained, with boxes and masks that depend on the image."""
    return tiny.solq_model(ModelMeta(["cat", "", "dog"], [5, 6, 9], 64, 96), num_queries=5)


@pytest.fixture
def predictor(model: SOLQ) -> Predictor:
    return Predictor(model)


# ---- predicting


def assert_same(a: Detections, b: Detections) -> None:
    torch.testing.assert_close(a.boxes, b.boxes)
    torch.testing.assert_close(a.scores, b.scores)
    assert torch.equal(a.labels, b.labels)
    assert a.masks is not None
    assert b.masks is not None
    assert a.masks.shape == b.masks.shape
    assert (a.masks != b.masks).float().mean() < 1e-3


def test_every_kind_of_input_gives_the_same(predictor, tmp_path):
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = predictor(pixels, threshold=0)
    assert isinstance(expected, Detections)
    assert expected.masks is not None
    assert expected.masks.shape == (15, 40, 60)
    assert expected.masks.dtype == torch.bool
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels), as_tensor(pixels)):
        assert_same(predictor(image, threshold=0), expected)
    for images in (tmp_path, str(tmp_path), [tmp_path], [pixels], as_tensor(pixels)[None], iter([pixels])):
        (only,) = predictor(images, threshold=0)
        assert_same(only, expected)


def test_detections_are_the_models_own(predictor, model):
    """Against the steps by hand: resized to a shorter side of 64, normalized, decoded in the original size."""
    pixels = as_tensor(picture(32, 32))
    resized = nn.functional.interpolate(pixels[None], (64, 64), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (resized / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        outputs = model(images, torch.zeros(1, 64, 64, dtype=torch.bool))
    (expected,) = model.postprocess(outputs, torch.tensor([[32, 32]]), 7, 0.0)
    assert_same(predictor(pixels, threshold=0, top_k=7), expected)


def mixed_images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (64, 64), (61, 33), (40, 60), (1, 1), (90, 30), (40, 61), (64, 64), (30, 90)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mixed_sizes_come_back_in_order(model, batch_size):
    images = mixed_images()
    predictor = Predictor(model, batch_size=batch_size)
    for image, found in zip(images, predictor(images, threshold=0), strict=True):
        assert found.masks.shape == (15, *image.shape[:2])
        alone = predictor(image, threshold=0)
        if batch_size == 1:
            assert_same(found, alone)
    same_size = predictor([images[1], images[7]], threshold=0)
    assert_same(same_size[0], predictor(images[1], threshold=0))
    assert_same(same_size[1], predictor(images[7], threshold=0))


def test_batches_are_of_similar_sizes(model, monkeypatch):
    predictor = Predictor(model, batch_size=2)
    batches = []
    compute = predictor._forward

    def recording(images: Tensor, padding_mask: Tensor) -> dict:
        batches.append((tuple(images.shape), float(padding_mask.float().mean())))
        return compute(images, padding_mask)

    monkeypatch.setattr(predictor, "_forward", recording)
    list(predictor.stream(mixed_images()))
    assert sum(shape[0] for shape, _ in batches) == 9
    assert any(shape[0] == 2 for shape, _ in batches)
    assert max(padding for _, padding in batches) < 0.2


def test_a_stream_is_read_only_as_far_as_needed(predictor):
    """A webcam or a folder of millions: images are taken as results are."""
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield picture()

    stream = predictor.stream(endless())
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(taken) < 20


def test_bad_images_leave_the_others_alone(predictor, tmp_path, caplog):
    good = picture()
    Image.fromarray(good).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    Image.fromarray(good).save(tmp_path / "d.jpg", quality=95)
    with caplog.at_level(logging.WARNING):
        found = predictor([tmp_path, good, tmp_path / "missing.png", np.zeros((3, 3, 2), np.uint8)], threshold=0)
    assert [detections is None for detections in found] == [False, True, True, False, False, True, True]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    assert all("\n" not in message for message in messages)
    assert "b.png cannot be read as an image" in messages[0]
    assert "c.jpg cannot be read as an image" in messages[1]
    assert "missing.png: no such file" in messages[2]
    assert "image 6: it has 2 channels" in messages[3]
    with pytest.raises(OSError, match="cannot be read as an image"):
        predictor(tmp_path / "b.png")


def test_empty_folder(predictor, tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        predictor(tmp_path)
    predictions = list(predictor.stream([tmp_path, picture()]))
    assert "holds no images" in str(predictions[0].error)
    assert predictions[1].detections is not None


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (10, 20_000), (20_000, 10)])
def test_extreme_sizes(predictor, size):
    found = predictor(np.full((*size, 3), 100, np.uint8), threshold=0, top_k=3)
    assert found.masks.shape == (3, *size)
    assert found.boxes.isfinite().all()


def test_threshold_and_top_k(predictor):
    everything = predictor(picture(), threshold=0)
    assert len(everything) == 15
    middle = float(everything.scores[6])
    best = predictor(picture(), threshold=middle)
    assert_same(best, everything[:7])
    assert_same(predictor(picture(), threshold=0, top_k=4), everything[:4])
    with pytest.raises(TypeError, match="an image is a NoneType, must be a path"):
        predictor(None)
    with pytest.raises(ValueError, match=r"threshold is 1\.5, must be in 0\.\.1"):
        predictor(picture(), threshold=1.5)
    with pytest.raises(ValueError, match="top_k is 0, must be at least 1"):
        predictor(picture(), top_k=0)


def test_half_precision_finds_about_the_same(model):
    exact = Predictor(model)(picture(), threshold=0)
    rounded = Predictor(model, dtype=torch.bfloat16)(picture(), threshold=0)
    torch.testing.assert_close(rounded.scores, exact.scores, atol=0.02, rtol=0)
    assert rounded.boxes.dtype == torch.float32


def test_compiled_sizes_are_few(model, monkeypatch):
    """What a compiled predictor computes; the compiler itself is left out, it needs minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    predictor = Predictor(model, compile=True, batch_size=2)
    shapes = set()
    compute = predictor._forward

    def recording(images: Tensor, padding_mask: Tensor) -> dict:
        shapes.add(tuple(images.shape))
        return compute(images, padding_mask)

    monkeypatch.setattr(predictor, "_forward", recording)
    found = predictor([*mixed_images(), *mixed_images()], threshold=0)
    assert [len(detections) for detections in found] == [15] * 18
    assert len({shape[2:] for shape in shapes}) <= 6


def test_class_names(model):
    predictor = Predictor(model, class_names=["a", "b", "c"])
    found = predictor(picture(), threshold=0)
    assert found.class_names == ["abc"[label] for label in found.labels]
    assert model.meta.class_names == ["cat", "", "dog"]
    with pytest.raises(ValueError, match="class_names has 2 entries but the model has 3 classes"):
        Predictor(model, class_names=["a", "b"])
    with pytest.raises(ValueError, match="class_names has 0 entries but the model has 3 classes"):
        Predictor(model, class_names=[])


def test_settings_that_cannot_be(model):
    with pytest.raises(ValueError, match="torch finds no GPU" if not torch.cuda.is_available() else "device is"):
        Predictor(model, device="cuda" if not torch.cuda.is_available() else "nonsense")
    with pytest.raises(ValueError, match="device is 'nonsense', must be auto"):
        Predictor(model, device="nonsense")
    with pytest.raises(ValueError, match="device is 'meta', must be auto"):
        Predictor(model, device="meta")
    for name in ("size", "max_size", "batch_size", "workers"):
        with pytest.raises(ValueError, match=f"{name} is 0, must be at least 1"):
            Predictor(model, **{name: 0})
    with pytest.raises(ValueError, match=r"dtype is torch\.int8, must be"):
        Predictor(model, dtype=torch.int8)


def test_a_path_is_loaded(model, tmp_path):
    solq.save(model, tmp_path / "model.safetensors")
    expected = Predictor(model)(picture(), threshold=0)
    assert_same(Predictor(tmp_path / "model.safetensors")(picture(), threshold=0), expected)


def test_work_ahead_keeps_order():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        assert list(map_ahead(pool, lambda n: n * n, range(50), 7)) == [n * n for n in range(50)]


# ---- what detections can do


def test_detections_name_draw_and_convert(predictor, tmp_path):
    pixels = picture(400, 600)
    found = predictor(pixels, threshold=0, top_k=4)
    names = {0: "cat", 1: "class 1", 2: "dog"}
    assert found.class_names == [names[label] for label in found.labels.tolist()]
    assert found[:2].class_names == found.class_names[:2]
    drawn = found.draw(pixels)
    assert drawn.size == (600, 400)
    assert (np.asarray(drawn) != pixels).any()
    assert (np.asarray(found.draw(pixels, threshold=1.0)) == pixels).all()
    with pytest.raises(ValueError, match=r"image is 40x60 but the masks are of an image of 400x600"):
        found.draw(picture())
    categories = {0: 5, 1: 6, 2: 9}
    assert [e["category_id"] for e in found.to_coco(1)] == [categories[label] for label in found.labels.tolist()]
    assert [e["category_id"] for e in found.to_coco(1, [1, 2, 3])] == [label + 1 for label in found.labels.tolist()]
    assert len(found.rle()) == 4


def test_to_supervision(predictor):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = predictor(picture(), threshold=0, top_k=4)
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections)
    assert len(converted) == 4
    assert converted.mask.shape == (4, 40, 60)
    assert converted.data["class_name"].tolist() == found.class_names
    np.testing.assert_allclose(converted.xyxy, found.boxes.numpy())


def test_real_images(predictor, coco_tiny):
    files = sorted((coco_tiny / "val2017").iterdir())[:6]
    found = predictor(files, threshold=0, top_k=3)
    for file, detections in zip(files, found, strict=True):
        width, height = Image.open(file).size
        assert detections.masks.shape == (3, height, width)
    assert Path(files[0]).suffix == ".jpg"
