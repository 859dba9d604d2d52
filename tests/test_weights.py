"""Files of weights: what is saved comes back, official names find their places, and nothing in a file is run."""

import argparse
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import solq
from solq.detections import ModelMeta, coco_class_names
from solq.models.solq.config import SOLQConfig
from solq.models.solq.model import SOLQ
from solq.models.solq.official import infer_config, official_names
from solq.training.checkpoint import save_checkpoint
from solq.training.presets import preset

Shapes = dict[str, list[int]]


@pytest.fixture(scope="module")
def small_model() -> SOLQ:
    torch.manual_seed(0)
    model = SOLQ(replace(preset("shapes", cpu=True).model, num_classes=3))
    model.meta = ModelMeta(["cat", "", "dog"], [5, 6, 9], 128, 200, "CC-BY-4.0")
    return model.eval()


def assert_same_model(model: SOLQ, expected: SOLQ) -> None:
    assert model.config == expected.config
    state, expected_state = model.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[key], expected_state[key]) for key in state)
    assert not model.training


# ---- this project's files


def test_safetensors_come_back(small_model, tmp_path):
    path = tmp_path / "folder" / "model.safetensors"
    solq.save(small_model, path)
    loaded = solq.load(path)
    assert_same_model(loaded, small_model)
    assert loaded.meta == small_model.meta
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["license"] == "CC-BY-4.0"
    assert json.loads(metadata["model_meta"])["class_names"] == ["cat", "", "dog"]
    assert json.loads(metadata["model_config"])["num_queries"] == small_model.config.num_queries
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]


def test_fitted_coding_is_part_of_the_file(tmp_path):
    config = replace(preset("shapes", cpu=True).model, mask_coding="pca", num_coefficients=4, mask_size=8)
    model = SOLQ(config).eval()
    model.masks.coding.fit(torch.rand(20, 8, 8) > 0.5)
    solq.save(model, tmp_path / "model.safetensors")
    loaded = solq.load(tmp_path / "model.safetensors")
    assert_same_model(loaded, model)
    assert loaded.masks.coding.fitted


def training_state(model: SOLQ, **entries: Any) -> dict[str, Any]:
    return {
        "step": 3,
        "model": model.state_dict(),
        "ema": None,
        "config": {"eval_scale": 256, "max_size": 400, "lr": 1e-4},
        "model_config": vars(model.config),
        "class_names": ["cat", "", "dog"],
        "category_ids": [5, 6, 9],
        **entries,
    }


def test_training_checkpoint(small_model, tmp_path):
    path = save_checkpoint(tmp_path, 3, training_state(small_model))
    loaded = solq.load(path)
    assert_same_model(loaded, small_model)
    assert loaded.meta == ModelMeta(["cat", "", "dog"], [5, 6, 9], 256, 400)


def test_training_checkpoint_gives_the_moving_average(small_model, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(small_model, use_buffers=True)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.add_(1)
    path = save_checkpoint(tmp_path, 3, training_state(small_model, ema=average.state_dict()))
    assert_same_model(solq.load(path), average.module.eval())


def test_save_refuses_what_does_not_fit(small_model, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        solq.save(small_model, tmp_path / "model.pth")
    model = SOLQ(small_model.config)
    model.meta = ModelMeta(class_names=["cat"])
    with pytest.raises(ValueError, match="class_names has 1 entries but the model has 3 classes"):
        solq.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- official files


def official_shapes(depths: tuple[int, ...] = (3, 4, 6, 3), two_stage: bool = False) -> Shapes:
    """Every key of an official ResNet checkpoint and its shape, written down independently of the reader."""
    width, heads, levels, points = 384, 8, 4, 4
    layers = 7 if two_stage else 6

    def linear(name: str, out: int, into: int) -> Shapes:
        return {f"{name}.weight": [out, into], f"{name}.bias": [out]}

    def norm(name: str, channels: int, *, frozen: bool = False) -> Shapes:
        entries = ("weight", "bias", "running_mean", "running_var") if frozen else ("weight", "bias")
        return {f"{name}.{entry}": [channels] for entry in entries}

    shapes: Shapes = {"transformer.level_embed": [levels, width]}
    for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        for i in range(6):
            layer = f"transformer.{part}.layers.{i}"
            shapes |= linear(f"{layer}.{attention}.sampling_offsets", heads * levels * points * 2, width)
            shapes |= linear(f"{layer}.{attention}.attention_weights", heads * levels * points, width)
            shapes |= linear(f"{layer}.{attention}.value_proj", width, width)
            shapes |= linear(f"{layer}.{attention}.output_proj", width, width)
            shapes |= linear(f"{layer}.linear1", 1024, width) | linear(f"{layer}.linear2", width, 1024)
            for n in range(1, 3 if part == "encoder" else 4):
                shapes |= norm(f"{layer}.norm{n}", width)
            if part == "decoder":
                shapes |= {f"{layer}.self_attn.in_proj_weight": [3 * width, width]}
                shapes |= {f"{layer}.self_attn.in_proj_bias": [3 * width]}
                shapes |= linear(f"{layer}.self_attn.out_proj", width, width)
    for i in range(layers):
        for prefix in ("", "transformer.decoder."):
            for j, out in enumerate((width, width, 4)):
                shapes |= linear(f"{prefix}bbox_embed.{i}.layers.{j}", out, width)
            if two_stage or not prefix:
                shapes |= linear(f"{prefix}class_embed.{i}", 91, width)
        for j, (out, into) in enumerate(((1024, width), (1024, 1024), (256, 1024))):
            shapes |= linear(f"vector_embed.{i}.layers.{j}", out, into)
    if two_stage:
        shapes |= linear("transformer.enc_output", width, width) | norm("transformer.enc_output_norm", width)
        shapes |= linear("transformer.pos_trans", 2 * width, 2 * width)
        shapes |= norm("transformer.pos_trans_norm", 2 * width)
    else:
        shapes |= linear("transformer.reference_points", 2, width) | {"query_embed.weight": [300, 2 * width]}
    for level, (channels, kernel) in enumerate(((512, 1), (1024, 1), (2048, 1), (2048, 3))):
        shapes |= {f"input_proj.{level}.0.weight": [width, channels, kernel, kernel]}
        shapes |= {f"input_proj.{level}.0.bias": [width]} | norm(f"input_proj.{level}.1", width)
    body = "backbone.0.body"
    shapes |= {f"{body}.conv1.weight": [64, 3, 7, 7]} | norm(f"{body}.bn1", 64, frozen=True)
    into = 64
    for stage, depth in enumerate(depths):
        inner = 64 << stage
        for i in range(depth):
            block = f"{body}.layer{stage + 1}.{i}"
            convolutions = ((inner, into, 1), (inner, inner, 3), (4 * inner, inner, 1))
            for n, (out, channels, kernel) in enumerate(convolutions, 1):
                shapes |= {f"{block}.conv{n}.weight": [out, channels, kernel, kernel]}
                shapes |= norm(f"{block}.bn{n}", out, frozen=True)
            if i == 0:
                shapes |= {f"{block}.downsample.0.weight": [4 * inner, into, 1, 1]}
                shapes |= norm(f"{block}.downsample.1", 4 * inner, frozen=True)
            into = 4 * inner
    return shapes


def official_swin_shapes(embed: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> Shapes:
    """The same with a Swin transformer, named as in Microsoft's repository. No released file was at hand."""
    shapes = {key: shape for key, shape in official_shapes().items() if not key.startswith("backbone.")}
    for level, channels in enumerate((2 * embed, 4 * embed, 8 * embed, 8 * embed)):
        shapes[f"input_proj.{level}.0.weight"][1] = channels
    body = "backbone.0.body"
    shapes |= {f"{body}.patch_embed.proj.weight": [embed, 3, 4, 4], f"{body}.patch_embed.proj.bias": [embed]}
    shapes |= {f"{body}.patch_embed.norm.{entry}": [embed] for entry in ("weight", "bias")}
    for stage, depth in enumerate(depths):
        dim = embed << stage
        for i in range(depth):
            block = f"{body}.layers.{stage}.blocks.{i}"
            for name, out, channels in (
                ("attn.qkv", 3 * dim, dim),
                ("attn.proj", dim, dim),
                ("mlp.fc1", 4 * dim, dim),
                ("mlp.fc2", dim, 4 * dim),
            ):
                shapes |= {f"{block}.{name}.weight": [out, channels], f"{block}.{name}.bias": [out]}
            shapes |= {f"{block}.{n}.{entry}": [dim] for n in ("norm1", "norm2") for entry in ("weight", "bias")}
            shapes |= {f"{block}.attn.relative_position_bias_table": [13 * 13, heads[stage]]}
            shapes |= {f"{block}.attn.relative_position_index": [49, 49]}
        if stage < 3:
            end = f"{body}.layers.{stage}.downsample"
            shapes |= {f"{end}.reduction.weight": [2 * dim, 4 * dim]}
            shapes |= {f"{end}.norm.{entry}": [4 * dim] for entry in ("weight", "bias")}
        if stage > 0:
            shapes |= {f"{body}.norm{stage}.{entry}": [dim] for entry in ("weight", "bias")}
    return shapes


def relative_position_index(side: int = 7) -> Tensor:
    """Row of the bias table for each pair of positions in a window (Swin transformer, section 3.2)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows, columns = y[:, None] - y + side - 1, x[:, None] - x + side - 1
    return rows * (2 * side - 1) + columns


def held_once(key: str) -> str:
    """Of the names of one tensor the one that its values are drawn for."""
    return re.sub(r"^vector_embed\.\d+", "vector_embed.0", key.removeprefix("transformer.decoder."))


def random_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Values for official keys, always the same, with which no layer explodes or dies."""
    generator = torch.Generator().manual_seed(0)
    held = [key for key in shapes if re.match(r"transformer\.decoder\.(bbox|class)_embed|vector_embed\.[1-9]", key)]
    weights: dict[str, Tensor] = {}
    for key in sorted(shapes.keys() - set(held)):
        shape = shapes[key]
        noise = torch.rand(shape, generator=generator) - 0.5
        if key.endswith("running_var"):
            weights[key] = 1 + 0.2 * noise
        elif re.search(r"(norm|bn)\d*\.weight$|downsample\.1\.weight$|input_proj\.\d\.1\.weight$", key):
            weights[key] = (0.5 if "bn" in key or "downsample.1" in key else 1) + 0.2 * noise
        elif len(shape) > 1:
            weights[key] = noise * (12 / torch.Size(shape[1:]).numel()) ** 0.5
        else:
            weights[key] = 0.2 * noise
        if key.endswith("relative_position_index"):
            weights[key] = relative_position_index()
    return weights | {key: weights[held_once(key)] for key in held}


def save_official(weights: dict[str, Tensor], path: Path, **settings: Any) -> Path:
    """As the official training loop writes it."""
    torch.save(
        {"model": weights, "optimizer": {"state": {}}, "epoch": 49, "args": argparse.Namespace(**settings)}, path
    )
    return path


@pytest.fixture(scope="module")
def official_r50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "solq_r50_final.pth"
    return save_official(random_weights(official_shapes()), path, nheads=8, activation="relu", lr=2e-4)


def two_images() -> tuple[Tensor, Tensor]:
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)) * 4 - 2
    padding_mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding_mask[1, 70:] = True
    padding_mask[1, :, 100:] = True
    return images * ~padding_mask[:, None], padding_mask


# Outputs of the official code (megvii-research/SOLQ, commit 97f537c, its PyTorch path for the attention) with the same
# weights for the same images: queries 0, 75, 150, 225, of each the first two entries.
# fmt: off
OFFICIAL_R50 = {
    "pred_logits": [-1.73027, -0.40793, -1.73686, -0.42312, -1.72926, -0.33383, -1.70636, -0.3341,
                    -1.75555, -0.2129, -1.74561, -0.23831, -1.81262, -0.17193, -1.77952, -0.16848],
    "pred_boxes": [0.75043, 0.3574, 0.7643, 0.33296, 0.80466, 0.40333, 0.81462, 0.37807,
                   0.7485, 0.35077, 0.7602, 0.31723, 0.80056, 0.40031, 0.80557, 0.37245],
    "pred_vectors": [0.01304, -0.65328, 0.01483, -0.66377, 0.01056, -0.62198, -0.00257, -0.63626,
                     0.09, -0.67178, 0.08468, -0.67754, 0.08981, -0.64851, 0.07258, -0.65918],
}
OFFICIAL_SWIN_T = {
    "pred_logits": [0.95742, -0.69863, 0.89955, -0.71389, 0.97663, -0.63505, 0.9239, -0.66507,
                    0.41553, -0.19686, 0.36878, -0.10743, 0.44425, -0.1708, 0.47449, -0.1001],
    "pred_boxes": [0.25053, 0.73646, 0.27961, 0.7324, 0.25077, 0.75763, 0.29967, 0.79511,
                   0.20481, 0.79121, 0.24847, 0.77318, 0.22258, 0.80602, 0.35037, 0.82284],
    "pred_vectors": [0.16859, -0.06636, 0.19721, -0.0589, 0.15898, -0.03773, 0.20816, -0.02652,
                     0.50792, -0.00093, 0.52573, 0.01983, 0.51376, 0.01505, 0.51897, 0.07411],
}
# fmt: on


@torch.no_grad()
def assert_outputs(model: SOLQ, expected: dict[str, list[float]]) -> None:
    outputs = model(*two_images())
    for key, values in expected.items():
        assert outputs[key][-1, :, ::75, :2].flatten().tolist() == pytest.approx(values, abs=1e-4), key


def test_official_r50_gives_the_official_outputs(official_r50):
    model = solq.load(official_r50)
    assert model.config == SOLQConfig(num_coefficients=256, mask_size=128)
    assert model.meta.class_names[1] == "person"
    assert model.meta.class_names[90] == "toothbrush"
    assert sum(map(bool, model.meta.class_names)) == 80
    assert_outputs(model, OFFICIAL_R50)


def test_official_swin_gives_the_official_outputs(tmp_path):
    weights = random_weights(official_swin_shapes(96, (2, 2, 6, 2), (3, 6, 12, 24)))
    model = solq.load(save_official(weights, tmp_path / "swin.pth"))
    assert model.config.backbone == "swin-t"
    assert (model.meta.eval_scale, model.meta.max_size) == (1088, 1536)
    assert_outputs(model, OFFICIAL_SWIN_T)


@pytest.mark.parametrize(
    ("backbone", "two_stage", "shapes"),
    [
        ("resnet50", False, official_shapes()),
        ("resnet101", False, official_shapes((3, 4, 23, 3))),
        ("resnet50", True, official_shapes(two_stage=True)),
        ("swin-s", False, official_swin_shapes(96, (2, 2, 18, 2), (3, 6, 12, 24))),
        ("swin-l", False, official_swin_shapes(192, (2, 2, 18, 2), (6, 12, 24, 48))),
    ],
    ids=["r50", "r101", "r50 two-stage", "swin-s", "swin-l"],
)
def test_every_official_key_has_its_place(backbone, two_stage, shapes):
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = infer_config(weights)
    assert config == SOLQConfig(backbone=backbone, two_stage=two_stage, num_coefficients=256, mask_size=128)
    with torch.device("meta"):
        model = SOLQ(config)
    tensors = dict(model.named_buffers()) | model.state_dict()
    places = {name: list(tensors[key].shape) for key in tensors for name in official_names(key, config)}
    assert places == shapes


def test_official_settings_that_sizes_do_not_tell():
    weights = {key: torch.empty(shape, device="meta") for key, shape in official_shapes(two_stage=True).items()}
    settings = argparse.Namespace(nheads=4, gt_mask_len=64, num_queries=100)
    config = infer_config(weights, settings)
    assert (config.num_heads, config.num_points, config.mask_size, config.num_queries) == (4, 8, 64, 100)
    with pytest.raises(ValueError, match="trained with dilation True, must be False"):
        infer_config(weights, argparse.Namespace(dilation=True))


def test_official_weights_of_a_wrapped_model(official_r50, tmp_path):
    """Saved from `DistributedDataParallel`, the settings as a dict."""
    weights = torch.load(official_r50, weights_only=False)["model"]
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"model": wrapped, "args": {"nheads": 4, "gt_mask_len": 64}}, tmp_path / "wrapped.pth")
    model = solq.load(tmp_path / "wrapped.pth")
    assert (model.config.num_heads, model.config.num_points, model.config.mask_size) == (4, 8, 64)
    assert torch.equal(model.query_embed.weight, weights["query_embed.weight"])


def test_official_file_that_does_not_fit(official_r50, tmp_path):
    weights = torch.load(official_r50, weights_only=False)["model"]
    del weights["transformer.reference_points.bias"], weights["class_embed.5.bias"]
    weights["something.else"] = torch.zeros(2)
    weights["input_proj.0.0.bias"] = torch.zeros(3)
    weights["transformer.decoder.bbox_embed.2.layers.0.bias"] = weights["bbox_embed.2.layers.0.bias"] + 1
    with pytest.raises(ValueError, match="the file lacks") as raised:
        solq.load(save_official(weights, tmp_path / "broken.pth"))
    message = str(raised.value)
    assert "lacks class_embed.5.bias, transformer.reference_points.bias" in message.replace(
        "transformer.reference_points.bias, class_embed.5.bias", "class_embed.5.bias, transformer.reference_points.bias"
    )
    assert "holds what the model lacks: something.else" in message
    assert "input_proj.0.0.bias [3] instead of [384]" in message
    assert "different values under transformer.decoder.bbox_embed.2.layers.0.bias" in message
    assert "\n" not in message


# ---- files that are refused


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "in the settings"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind):
    path, folder = tmp_path / "harmful.pth", tmp_path / "was here"
    content: Any = {"model": {"weight": torch.zeros(1)}, "extra": Harmful(folder)}
    if kind == "in the settings":
        content = {"model": {"weight": torch.zeros(1)}, "args": argparse.Namespace(extra=Harmful(folder))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ValueError, match=r"is refused: .*; nothing was run") as raised:
        solq.load(path)
    assert "\n" not in str(raised.value)
    assert kind == "pickle" or "would call posix.mkdir" in str(raised.value)
    assert not folder.exists()


def test_what_is_no_checkpoint(tmp_path, small_model):
    cases: dict[str, tuple[bytes, str]] = {
        "text.pth": (b"this is no checkpoint", "damaged or not a checkpoint"),
        "hello.pth": (b"hello\n", r"damaged or not a checkpoint \(KeyError\(101\)\)"),
        "empty.pth": (b"", "damaged or not a checkpoint"),
        "text.safetensors": (b"this is no checkpoint", "damaged or not a safetensors file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is {message}") as raised:
            solq.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    solq.save(small_model, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        solq.load(tmp_path / "half.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        solq.load(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError, match="is a folder: name a file in it"):
        solq.load(tmp_path)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no weights of a model"):
        solq.load(tmp_path / "list.pth")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"neither a file of solq\.save"):
        solq.load(tmp_path / "other.safetensors")


def test_settings_and_weights_that_do_not_fit_each_other(small_model, tmp_path):
    state = training_state(small_model)
    state["class_names"] = ["cat"]
    with pytest.raises(ValueError, match="class_names has 1 entries but the model has 3 classes"):
        solq.load(save_checkpoint(tmp_path, 1, state))
    state = training_state(small_model)
    state["model_config"] = {**state["model_config"], "width": 64}
    with pytest.raises(ValueError, match="holds tensors of another shape"):
        solq.load(save_checkpoint(tmp_path, 2, state))


@pytest.mark.parametrize(
    "entries",
    [
        {"config": 3},
        {"ema": 3},
        {"model_config": 4},
        {"model_config": {"future": 1}},
        {"model_config": {"width": -4}},
        {"model_config": {"num_heads": "many"}},
        {"category_ids": 5},
    ],
    ids=str,
)
def test_settings_that_make_no_model(small_model, tmp_path, entries):
    """Whatever another program wrote there, the file is named in one line."""
    if isinstance(entries.get("model_config"), dict):
        entries = {"model_config": {**vars(small_model.config), **entries["model_config"]}}
    path = save_checkpoint(tmp_path, 1, training_state(small_model, **entries))
    with pytest.raises(
        ValueError, match=r"step_00000001.pt has settings that make no model \(\w+: .*\): use"
    ) as raised:
        solq.load(path)
    assert "\n" not in str(raised.value)


def test_settings_that_the_model_refuses(small_model, tmp_path):
    config = {**vars(small_model.config), "num_heads": 0}
    path = save_checkpoint(tmp_path, 1, training_state(small_model, model_config=config))
    with pytest.raises(ValueError, match=r"step_00000001.pt: .* n_heads .* must be at least 1$"):
        solq.load(path)


def test_coco_names_are_known_by_their_ids():
    names = coco_class_names()
    assert len(names) == 91
    assert (names[0], names[12], names[17], names[18]) == ("", "", "cat", "dog")
