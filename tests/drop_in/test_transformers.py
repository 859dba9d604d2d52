"""transformers' own models, small and random, give the same outputs, losses and gradients when patched."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models  # noqa: E402

from solq.drop_in import transformers as drop_in  # noqa: E402
from solq.kernels import use_backend  # noqa: E402

MODELS_FOLDER = Path(transformers.__path__[0]) / "models"


def folder_name(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> str:
    """Of a model in tiny_models, which may have variants."""
    return make.__name__.removesuffix("_discrete").removesuffix("_two_stage")


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs by name, and gradients of their sum by the parameter's name."""
    model = copy.deepcopy(model)  # OmDet-Turbo keeps its words, with their graph
    outputs = model(**inputs)
    tensors = {name: t for name, t in outputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    differentiable = [t[t.isfinite()].square().sum() for t in tensors.values() if t.requires_grad]
    torch.stack(differentiable).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in tensors.items()} | gradients


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within rounding: some gradients are zero but for the rounding of others, so the largest one is the measure."""
    assert ours.keys() == theirs.keys()
    largest = max(t[t.isfinite()].abs().max().item() for t in theirs.values() if t.isfinite().any())
    for name, expected in theirs.items():
        rtol, relative_atol = (1e-5, 1e-9) if expected.dtype == torch.float64 else (1e-3, 1e-5)
        atol = relative_atol * max(largest, 1.0)
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol, msg=(name + ": {}").format)


def made(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[nn.Module, dict[str, Any]]:
    """In float64, but for the models that make float32 constants."""
    if not (MODELS_FOLDER / folder_name(make)).is_dir():
        pytest.skip(f"transformers {transformers.__version__} has no {folder_name(make)}")
    torch.manual_seed(0)
    model, inputs = make()
    for name, parameter in model.named_parameters():  # as initialized, all queries sample alike
        if "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter, std=0.2)
    if make not in tiny_models.IN_FLOAT32:
        model, inputs["pixel_values"] = model.double(), inputs["pixel_values"].double()
    return model.eval(), inputs


@pytest.mark.parametrize("make", tiny_models.MODELS, ids=lambda make: make.__name__)
def test_outputs_losses_and_gradients_stay(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    model, inputs = made(make)
    theirs = results(model, inputs)
    assert any("attention_weights" in name for name in theirs)
    with drop_in.patched():
        assert_equal(results(model, inputs), theirs)
    assert_equal(results(model, inputs), theirs)


@pytest.mark.parametrize("make", [tiny_models.rt_detr], ids=lambda make: make.__name__)
def test_the_kernels_themselves(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    model, inputs = made(make)
    inputs = {"pixel_values": inputs["pixel_values"][:1, :, :32, :32], "labels": inputs["labels"][:1]}  # it is slow
    theirs = results(model, inputs)
    with drop_in.patched(), use_backend("triton"):
        assert_equal(results(model, inputs), theirs)


def test_the_dtypes_of_autocast_stay() -> None:
    """Also where nothing after the attention casts, as in D-FINE."""
    for make in (tiny_models.deformable_detr, tiny_models.d_fine):
        model, inputs = made(make)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = results(model, inputs)
            with drop_in.patched():
                ours = results(model, inputs)
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}


def test_the_patched_model_calls_our_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*arguments: object) -> None:
        raise ConnectionError("our operator was called")

    monkeypatch.setattr("solq.drop_in.attention.ms_deform_attn", called)
    for make in (tiny_models.deformable_detr, tiny_models.d_fine, tiny_models.mask2former):
        model, inputs = made(make)
        with drop_in.patched(), pytest.raises(ConnectionError, match="our operator was called"):
            model(**inputs)


def test_every_model_with_the_attention_is_patched() -> None:
    sources = {path.stem: path.read_text() for path in MODELS_FOLDER.glob("*/modeling_*.py")}
    expected = {name for name, source in sources.items() if "self.sampling_offsets = " in source}
    with drop_in.patched() as names:
        assert {name.split(".")[3] for name in names if name.startswith("transformers.models.")} == expected
    assert expected <= {f"modeling_{folder_name(make)}" for make in tiny_models.MODELS}  # and tested above


def test_unpatching_restores_the_very_objects() -> None:
    def current() -> list[object]:
        return [vars(owner).get(name) for owner, name, _ in places]

    places = list(drop_in._find())
    before = current()
    assert drop_in.patch() == drop_in.patch()
    assert all(now is not then for now, then in zip(current(), before, strict=True))
    with drop_in.patched():
        pass
    assert all(now is not then for now, then in zip(current(), before, strict=True))  # patched before the context
    drop_in.unpatch()
    drop_in.unpatch()
    assert all(now is then for now, then in zip(current(), before, strict=True))
    assert all(name in vars(owner) or then is None for (owner, name, _), then in zip(places, before, strict=True))


def test_a_model_made_while_patched_is_its_own_afterwards() -> None:
    with drop_in.patched():
        model, inputs = made(tiny_models.d_fine)
        ours = results(model, inputs)
    attention = next(module for module in model.modules() if hasattr(module, "ms_deformable_attn_core"))
    assert attention.ms_deformable_attn_core.__module__ == "transformers.models.d_fine.modeling_d_fine"
    assert_equal(ours, results(model, inputs))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("num_points_list", [[4, 4, 4], [3, 6, 2]])
def test_points_that_differ_and_nearest_sampling(num_points_list: list[int], method: str, backend: str) -> None:
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2

    torch.manual_seed(0)
    shapes, points = [(5, 4), (3, 2), (1, 2)], sum(num_points_list)
    inputs = [torch.randn(2, 28, 2, 4), torch.rand(2, 7, 2, points, 2) * 1.4 - 0.2, torch.rand(2, 7, 2, points)]
    found = []
    for function in (drop_in._attention_v2, multi_scale_deformable_attention_v2):
        value, locations, weights = (tensor.clone().requires_grad_() for tensor in inputs)
        with use_backend(backend):
            output = function(value, shapes, locations, weights, num_points_list, method)
            output.square().sum().backward()
        found.append((output, value.grad, weights.grad, locations.grad))
    for ours, theirs in zip(*found, strict=True):
        if theirs is None:  # nearest sampling has no gradient to its locations
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_unknown_sampling_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'nearest', must be 'default' or 'discrete'"):
        drop_in._attention_v2(
            torch.rand(1, 1, 1, 1), [(1, 1)], torch.rand(1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1), [1], "nearest"
        )


def matchers() -> list[tuple[nn.Module, dict[str, int]]]:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
    from transformers.loss.loss_for_object_detection import HungarianMatcher
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    softmax = transformers.RTDetrConfig(use_focal_loss=False)
    matchers: list[tuple[nn.Module, dict[str, int]]] = [
        (HungarianMatcher(1, 5, 2), {}),
        (DeformableDetrHungarianMatcher(2, 5, 2), {}),
        (RTDetrHungarianMatcher(transformers.RTDetrConfig(matcher_alpha=0.3, matcher_gamma=1.5)), {}),
        (RTDetrHungarianMatcher(softmax), {}),
    ]
    if (MODELS_FOLDER / "lw_detr").is_dir():
        from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

        matchers.append((LwDetrHungarianMatcher(2, 5, 2), {"group_detr": 3}))
    return matchers


@pytest.mark.parametrize("sizes", [[3, 0, 5], [14, 1, 2], [0, 0, 0]], ids=str)
def test_matchers_give_the_same_pairs(sizes: list[int]) -> None:
    """Also with more targets than queries (12, or 4 in a group) and with no targets."""
    torch.manual_seed(0)
    outputs = {"logits": torch.randn(3, 12, 7), "pred_boxes": torch.rand(3, 12, 4) * 0.5 + 0.1}
    targets = [{"class_labels": torch.randint(7, (n,)), "boxes": torch.rand(n, 4) * 0.5 + 0.1} for n in sizes]
    for matcher, groups in matchers():
        theirs = matcher(outputs, targets, **groups)
        with drop_in.patched():
            ours = matcher(outputs, targets, **groups)
        for pairs, expected in zip(ours, theirs, strict=True):
            for index, expected_index in zip(pairs, expected, strict=True):
                torch.testing.assert_close(index, expected_index, rtol=0, atol=0)


def test_a_version_without_one_of_the_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in, "find_spec", lambda name: None if name.endswith(".loss_lw_detr") else name)
    with drop_in.patched() as names:
        matchers = {name.split(".")[2] for name in names if name.startswith("transformers.loss.")}
        assert matchers == {"loss_for_object_detection", "loss_deformable_detr", "loss_rt_detr"}


def test_attention_of_another_signature_is_left_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mask2former import modeling_mask2former

    def multi_scale_deformable_attention(value: Tensor, something_new: int) -> Tensor:
        return value

    multi_scale_deformable_attention.__module__ = modeling_mask2former.__name__
    monkeypatch.setattr(modeling_mask2former, "multi_scale_deformable_attention", multi_scale_deformable_attention)
    with (
        pytest.warns(UserWarning, match=r"modeling_mask2former is left unpatched.*\(value, something_new\)"),
        drop_in.patched(),
    ):
        assert modeling_mask2former.multi_scale_deformable_attention is multi_scale_deformable_attention
