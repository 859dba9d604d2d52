"""Backbones: what they hand on, what is trained, and where their weights come from."""

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from solq.models.backbones import RESNETS, SWINS, build_backbone
from solq.models.backbones.swin import TIMM_NAMES
from solq.models.backbones.weights import load_backbone_weights


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet10", [128, 256, 512]),
        ("resnet18", [128, 256, 512]),
        ("resnet50", [512, 1024, 2048]),
        ("resnet101", [512, 1024, 2048]),
    ],
)
def test_levels_of_resnets(name: str, channels: list[int]) -> None:
    backbone = build_backbone(name, "frozen").eval()
    assert backbone.num_channels == channels
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32))]  # noqa: B905


def test_resnet_computes_what_torchvision_does_with_batch_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet18()
    reference.train()
    with torch.no_grad():
        reference(torch.randn(4, 3, 64, 64))  # gives the running statistics something to be wrong about
    backbone = build_backbone("resnet18", "frozen").train()  # frozen in training too
    weights = {k: v for k, v in reference.state_dict().items() if "num_batches" not in k and not k.startswith("fc")}
    backbone.body.load_state_dict(weights)
    seen = {}
    for layer in (2, 3, 4):
        reference.get_submodule(f"layer{layer}").register_forward_hook(
            lambda _, __, out, k=layer: seen.update({k: out})
        )
    images = torch.randn(2, 3, 64, 96)
    reference.eval()(images)
    for ours, layer in zip(backbone(images), (2, 3, 4), strict=True):
        torch.testing.assert_close(ours, seen[layer])


def test_what_is_trained() -> None:
    """With frozen batch norm: stages 2 to 4. With group norm: everything."""
    trained = {
        name.split(".")[1] for name, p in build_backbone("resnet50", "frozen").named_parameters() if p.requires_grad
    }
    assert trained == {"layer2", "layer3", "layer4"}
    assert not any("bn" in name for name, _ in build_backbone("resnet50", "frozen").named_parameters())
    grouped = build_backbone("resnet10", "group")
    assert all(p.requires_grad for p in grouped.parameters())
    assert any(isinstance(module, nn.GroupNorm) for module in grouped.modules())


def test_running_batch_norm_is_fixed_but_for_its_trained_affine_map() -> None:
    """Training computes what evaluation does, changes no statistics, and gives gradients from the second stage on."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", "running").train()
    norm = backbone.body.layer2[0].bn1
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    images, before = torch.randn(2, 3, 64, 64), {k: v.clone() for k, v in backbone.named_buffers()}
    maps = backbone(images)
    sum(x.square().mean() for x in maps).backward()
    torch.testing.assert_close(maps, backbone.eval()(images), atol=0, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert norm.weight.grad.abs().sum() > 0
    assert norm.bias.grad.abs().sum() > 0
    x = torch.randn(2, 128, 3, 3)
    mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", [64, 128, 256, 512]), ("swin-t", [96, 192, 384, 768])])
@torch.no_grad()
def test_levels_from_the_second_on(name: str, channels: list[int]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, "frozen", first_level=2).eval()
    assert backbone.num_channels == channels
    images = torch.randn(1, 3, 64, 96)
    maps = backbone(images)
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    finer = build_backbone(name, "frozen").eval()
    state = backbone.state_dict()
    for level in range(3 if name == "swin-t" else 0):  # its norms are numbered by level
        for entry in ("weight", "bias"):
            state[f"norms.{level}.{entry}"] = state[f"norms.{level + 1}.{entry}"]
    finer.load_state_dict({key: state[key] for key in finer.state_dict()})
    torch.testing.assert_close(finer(images), maps[1:])


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("swin-t", "frozen").eval()


@pytest.mark.parametrize("size", [(64, 96), (65, 91), (230, 33)])
@torch.no_grad()
def test_levels_of_swin_at_any_size(swin: nn.Module, size: tuple[int, int]) -> None:
    assert swin.num_channels == [192, 384, 768]
    maps = swin(torch.randn(2, 3, *size))
    for x, channels, stride in zip(maps, swin.num_channels, (8, 16, 32), strict=True):
        assert x.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert x.isfinite().all()
        normalized = x.flatten(2).transpose(1, 2)  # the norms are fresh: mean 0 and variance 1 of each pixel
        torch.testing.assert_close(normalized.mean(-1), torch.zeros_like(normalized.mean(-1)), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            normalized.var(-1, unbiased=False), torch.ones_like(normalized.mean(-1)), atol=2e-2, rtol=0
        )


@torch.no_grad()
def test_swin_computes_what_timm_does(swin: nn.Module) -> None:
    """At the size of its classifier, whose last stage is one window; it is shifted too, as in detectors."""
    reference = timm.create_model(TIMM_NAMES["swin-t"], always_partition=True).eval()
    backbone = build_backbone("swin-t", "frozen").eval()
    state = {key.replace("layers.", "layers_", 1): value for key, value in reference.state_dict().items()}
    backbone.body.load_state_dict({key: state[key] for key in backbone.body.state_dict()})
    images = torch.randn(1, 3, 224, 224)
    last = reference.forward_features(images)  # normalized by the classifier's own norm, fresh as well
    torch.testing.assert_close(backbone(images)[-1], last.permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backbone is 'vgg16', must be one of resnet10, .*swin-l"):
        build_backbone("vgg16", "frozen")
    assert set(RESNETS).isdisjoint(SWINS)


# ---- weights


@pytest.mark.parametrize("ending", ["plain.pth", "model.pth", "state_dict.pth", "file.safetensors"])
def test_weights_of_a_file(tmp_path: Path, ending: str) -> None:
    classifier = torchvision.models.resnet18()
    path, state = tmp_path / ending, classifier.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if path.stem == "plain" else {path.stem: state}, path)
    backbone = build_backbone("resnet18", "frozen")
    load_backbone_weights(backbone, "resnet18", str(path))
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_weights_of_a_swin_classifier(tmp_path: Path) -> None:
    state = timm.create_model(TIMM_NAMES["swin-t"]).state_dict()
    torch.save(state, tmp_path / "swin.pth")
    backbone = build_backbone("swin-t", "frozen")
    load_backbone_weights(backbone, "swin-t", str(tmp_path / "swin.pth"))
    key = "layers_3.blocks.1.attn.qkv.weight"
    assert torch.equal(backbone.body.state_dict()[key], state[key.replace("layers_", "layers.")])


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"r18.pth do not fit resnet50: \d+ of \d+ tensors .*conv1") as error:
        load_backbone_weights(build_backbone("resnet50", "frozen"), "resnet50", str(tmp_path / "r18.pth"))
    one_line(error)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    backbone = build_backbone("resnet10", "frozen")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth: no such file \(give a path, 'imagenet' or 'none'\)"):
        load_backbone_weights(backbone, "resnet10", str(tmp_path / "nowhere.pth"))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("these are not weights")
        with pytest.raises(ValueError, match=f"{name} are damaged") as error:
            load_backbone_weights(backbone, "resnet10", str(tmp_path / name))
        one_line(error)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth hold no state dict"):
        load_backbone_weights(backbone, "resnet10", str(tmp_path / "list.pth"))


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth are damaged"):
        load_backbone_weights(build_backbone("resnet10", "frozen"), "resnet10", str(tmp_path / "evil.pth"))


@pytest.mark.parametrize("name", ["resnet50", "swin-t"])
def test_download_impossible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    backbone = build_backbone(name, "frozen")
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(OSError, match=f"ImageNet weights of {name} cannot be downloaded") as error:
        load_backbone_weights(backbone, name, "imagenet")
    assert re.search(r"no route to host.*--backbone-weights PATH.*--backbone-weights none", one_line(error))


def test_no_published_weights_of_resnet10() -> None:
    with pytest.raises(ValueError, match=r"resnet10 has no ImageNet weights: give --backbone-weights none"):
        load_backbone_weights(build_backbone("resnet10", "frozen"), "resnet10", "imagenet")
