"""Pictures of attention show what the decoder sampled; pages are written for every image that can be."""

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from solq import Predictor, save
from solq.commands import figures
from solq.commands.settings import FiguresConfig
from solq.kernels import reference
from solq.kernels.ms_deform_attn.module import MSDeformAttn
from solq.models.solq.attention import sampling_points


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tiny.write_image(tmp_path / "images" / "noise.png", (48, 64))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_sampled_is_what_the_module_reads(coordinates: int) -> None:
    """The recomputed locations and weights give the module's own output."""
    torch.manual_seed(0)
    shapes, starts = [(6, 8), (3, 4)], [0, 48]
    module = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, memory = torch.randn(1, 5, 32), torch.randn(1, 60, 32)
    references = torch.rand(1, 5, 2, coordinates)
    attention = sampling_points(module, query, references, shapes)
    value = module.value_proj(memory).view(1, 60, 4, 8)
    read = reference.ms_deform_attn(value, shapes, starts, attention.locations[None], attention.weights[None])
    torch.testing.assert_close(module.output_proj(read), module(query, references, memory, shapes, starts))


@pytest.mark.parametrize("two_stage", [False, True])
def test_attention_belongs_to_the_detections(two_stage: bool, image: Path) -> None:
    predictor = Predictor(tiny.solq_model(two_stage=two_stage), device="cpu")
    detections, attention = figures.attend(predictor, image, layer=0, threshold=0.0)
    queries = detections.queries
    assert attention.locations.shape == (10, 2, 3, 4, 2)
    torch.testing.assert_close(attention.weights.sum((2, 3)), torch.ones(10, 2))
    again = predictor(image, threshold=0.0)
    torch.testing.assert_close(again.boxes, detections.boxes)
    # Detections of one query have its box, those of others have another.
    same_query = queries[:, None] == queries
    same_box = (detections.boxes[:, None] == detections.boxes).all(-1)
    assert torch.equal(same_query, same_box)
    assert not predictor.model.transformer.decoder.layers[0].cross_attn._forward_pre_hooks


def test_points_are_drawn_where_they_are_sampled() -> None:
    black = Image.new("RGB", (100, 50))
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.2]]).view(1, 1, 2, 2)
    found = Predictor(tiny.solq_model(mask_branch="none"), device="cpu")(black, threshold=0.0)[:1]
    found.boxes = torch.tensor([[5.0, 5, 95, 45]])
    drawn = figures._draw_attention(black, locations, torch.tensor([[[1.0, 0.0]]]), found)
    assert drawn.size == (560, 280)
    for place, color in (((140, 140), figures.COLORS[-1]), ((420, 56), figures.COLORS[0])):
        assert drawn.getpixel(place) == pytest.approx(color, abs=20)  # reduced from a finer drawing
    assert max(drawn.getpixel((280, 140))) < 50


def test_command_writes_pages_and_reports_what_cannot_be_read(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tiny.solq_model(), tmp_path / "unified.safetensors")
    save(tiny.solq_model(mask_branch="separate"), tmp_path / "separate.safetensors")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"no picture")
    config = FiguresConfig(
        tmp_path / "unified.safetensors",
        (damaged, image.parent),
        compare=tmp_path / "separate.safetensors",
        output=tmp_path / "out",
        objects=2,
        threshold=0.01,
        device="cpu",
    )
    with pytest.raises(SystemExit) as ended:
        figures.figures(config)
    assert ended.value.code == 1
    assert "damaged.jpg cannot be read as an image" in capsys.readouterr().err
    assert sorted(path.name for path in config.output.iterdir()) == ["noise-attention.png", "noise-compared.png"]
    for path in config.output.iterdir():
        with Image.open(path) as page:
            assert page.width == 3 * 560 + 4 * figures.MARGIN


def test_nothing_found(image: Path) -> None:
    solq = tiny.solq_model()
    for head in solq.class_embed:
        torch.nn.init.constant_(head.bias, -20.0)
        torch.nn.init.zeros_(head.weight)
    with pytest.raises(ValueError, match=r"noise.png: nothing has a score of 0.4 or more: lower --threshold"):
        figures.attention_figure(Predictor(solq, device="cpu"), image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ()}, "no images are given"),
        ({"objects": 0}, "objects is 0, must be at least 1"),
        ({"layer": 2}, r"layer is 2, must be in -2\.\.1"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict, message: str) -> None:
    save(tiny.solq_model(), tmp_path / "model.safetensors")
    config = FiguresConfig(**{"checkpoint": tmp_path / "model.safetensors", "images": (tmp_path,), **changes})
    with pytest.raises(ValueError, match=message):
        figures.figures(config)


def test_stages_of_queryinst(image: Path, tmp_path: Path) -> None:
    """A row for each object: its path of boxes and a mask after each stage, of which the last one is the result's."""
    model = tiny.queryinst_model()
    predictor = Predictor(model, device="cpu")
    with model.record_outputs() as recorded:
        detections = predictor(image, threshold=0.0)
    boxes = detections.boxes[None].expand(2, -1, -1)
    with torch.inference_mode():
        masks = model.masks.masks_by_layer(recorded[0], 0, detections.queries, detections.labels, boxes, (48, 64))
    assert recorded[0]["pred_boxes"].shape[0] == 2
    assert torch.equal(masks[-1], detections.masks)
    assert not torch.equal(masks[0], masks[-1])
    save(model, tmp_path / "model.safetensors")
    figures.figures(FiguresConfig(tmp_path / "model.safetensors", (image,), output=tmp_path, objects=2, threshold=0.0))
    page = Image.open(tmp_path / "noise-stages.png")
    assert page.width > 3 * 560
    assert page.height > 2 * 420
