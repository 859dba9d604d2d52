"""mmcv's own module, with or without mmcv's compiled part, mmdetection on it, and detrex by the same names."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from solq.drop_in import detrex as detrex_drop_in
from solq.drop_in import mmcv as drop_in
from solq.kernels import use_backend

needs_mmcv = pytest.mark.skipif(find_spec("mmcv") is None, reason="mmcv is not installed: pip install mmcv-lite")


@pytest.fixture
def attention_module() -> Iterator[Any]:
    """`mmcv.ops.multi_scale_deform_attn`, unpatched: mmcv-lite is importable only after patching once."""
    drop_in.patch()
    drop_in.unpatch()
    from mmcv.ops import multi_scale_deform_attn

    yield multi_scale_deform_attn
    drop_in.unpatch()


def run_module(module: Any) -> list[Tensor]:
    torch.manual_seed(0)
    layer = module.MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=2, num_points=3, dropout=0.0)
    torch.nn.init.normal_(layer.sampling_offsets.weight)
    query, value = torch.randn(5, 2, 16, requires_grad=True), torch.randn(16, 2, 16, requires_grad=True)
    shapes, starts = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
    reference_points = torch.rand(2, 5, 2, 2)
    output = layer(
        query, value=value, reference_points=reference_points, spatial_shapes=shapes, level_start_index=starts
    )
    return [output, *torch.autograd.grad(output.square().sum(), [query, value, *layer.parameters()])]


@needs_mmcv
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_module_gives_the_same(attention_module: Any, backend: str) -> None:
    theirs = run_module(attention_module)
    with drop_in.patched(), use_backend(backend):
        ours = run_module(attention_module)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@needs_mmcv
def test_the_function_of_the_compiled_operator(attention_module: Any) -> None:
    """What the module calls for CUDA tensors, by a reference to the class made before patching."""
    function = attention_module.MultiScaleDeformableAttnFunction
    shapes, starts = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
    value = torch.randn(2, 16, 2, 8, requires_grad=True)
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
    expected = attention_module.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    with drop_in.patched():
        actual = function.apply(value, shapes, starts, locations, weights, 64)
    torch.testing.assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual.square().sum(), value)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), value)[0])


@needs_mmcv
def test_unpatching_restores_the_very_objects(attention_module: Any) -> None:
    function, pytorch = attention_module.MultiScaleDeformableAttnFunction, vars(attention_module)
    original = pytorch["multi_scale_deformable_attn_pytorch"]
    assert drop_in.patch() == drop_in.patch()
    assert "apply" in vars(function)
    assert pytorch["multi_scale_deformable_attn_pytorch"] is not original
    drop_in.unpatch()
    assert "apply" not in vars(function)  # inherited again
    assert pytorch["multi_scale_deformable_attn_pytorch"] is original


@needs_mmcv
@pytest.mark.skipif(
    find_spec("mmcv") is not None and find_spec("mmcv._ext") is not None, reason="mmcv has its compiled operators"
)
def test_other_operators_say_that_they_are_not_compiled(attention_module: Any) -> None:
    from mmcv.ops import nms

    with pytest.raises(RuntimeError, match=r"mmcv\._ext is not compiled here, so there is no nms"):
        nms(torch.rand(3, 4), torch.rand(3), 0.5)


@pytest.mark.skipif(find_spec("mmcv") is not None, reason="mmcv is installed")
def test_without_mmcv() -> None:
    with pytest.raises(ImportError, match=r"^mmcv is not installed: mmcv 2\.0 to 2\.2 is known to work$"):
        drop_in.patch()


@pytest.mark.skipif(find_spec("detrex") is not None, reason="detrex is installed")
def test_without_detrex() -> None:
    with pytest.raises(ImportError, match=r"^detrex is not installed: "):
        detrex_drop_in.patch()


@pytest.mark.skipif(find_spec("detrex") is None, reason="detrex is not installed: it is on no package index")
def test_detrex_gives_the_same() -> None:
    from detrex.layers import multi_scale_deform_attn as module

    inputs = [torch.randn(2, 16, 2, 8), torch.tensor([(3, 4), (2, 2)]), torch.rand(2, 5, 2, 2, 3, 2)]
    weights = torch.rand(2, 5, 2, 2, 3)
    expected = module.multi_scale_deformable_attn_pytorch(*inputs, weights)
    starts = torch.tensor([0, 12])
    with detrex_drop_in.patched():
        actual = module.MultiScaleDeformableAttnFunction.apply(inputs[0], inputs[1], starts, inputs[2], weights, 64)
    torch.testing.assert_close(actual, expected)


STAND_IN = """
import torch
from detrex import _C


class MultiScaleDeformableAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        return _C.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    raise AssertionError
"""


@pytest.mark.skipif(find_spec("detrex") is not None, reason="detrex is installed")
def test_detrex_by_its_names(tmp_path: Path) -> None:
    """Not detrex: a package with the names of its module, and like a checkout of it without the compiled part."""
    (tmp_path / "detrex" / "layers").mkdir(parents=True)
    for folder in ("detrex", "detrex/layers"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "detrex" / "layers" / "multi_scale_deform_attn.py").write_text(STAND_IN)
    code = (
        "import torch\n"
        "from solq.drop_in import detrex as drop_in\n"
        "with drop_in.patched() as names:\n"
        "    from detrex.layers import multi_scale_deform_attn as module\n"
        "    inputs = torch.rand(1, 6, 2, 4), torch.tensor([(2, 3)]), torch.tensor([0]), torch.rand(1, 5, 2, 1, 3, 2)\n"
        "    output = module.MultiScaleDeformableAttnFunction.apply(*inputs, torch.rand(1, 5, 2, 1, 3), 64)\n"
        "    assert output.shape == (1, 5, 8), output.shape\n"
        "assert len(names) == 2, names\n"
        "module.MultiScaleDeformableAttnFunction.apply(*inputs, torch.rand(1, 5, 2, 1, 3), 64)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.stderr.endswith(
        "RuntimeError: detrex._C is not compiled here, so there is no ms_deform_attn_forward\n"
    )


MMDETECTION = """
import sys
from solq.drop_in import mmcv as drop_in
from solq.kernels import use_backend

drop_in.patch()
drop_in.unpatch()
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

register_all_modules()
config = Config.fromfile(sys.argv[1]).model
config.update(data_preprocessor=None, num_queries=20)
config.backbone.update(depth=18, init_cfg=None)
config.neck.in_channels = [128, 256, 512]
config.encoder.num_layers = config.decoder.num_layers = 1
torch.manual_seed(0)
model = MODELS.build(config).train()
for name, parameter in model.named_parameters():
    if "sampling_offsets" in name or "attention_weights" in name:
        torch.nn.init.normal_(parameter, std=0.2)

size = (64, 96)
sample = DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=size, ori_shape=size, scale_factor=(1, 1)))
boxes = torch.tensor([[5.0, 6, 50, 60], [30, 20, 90, 60]])
sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 3]))
image = torch.rand(1, 3, *size)


def losses_and_gradients():
    torch.manual_seed(1)  # dropout
    losses = {name: loss for name, loss in model.loss(image, [sample]).items() if "loss" in name}
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
    return losses, {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}


theirs = losses_and_gradients()
with drop_in.patched(), use_backend("reference"):
    ours = losses_and_gradients()
torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
print("the same")
"""


@pytest.mark.skipif(
    find_spec("mmdet") is None, reason="mmdetection is not installed: pip install mmdet==3.3.0 mmcv-lite==2.1.0"
)
@pytest.mark.parametrize(
    "config",
    ["deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py", "dino/dino-4scale_r50_8xb2-12e_coco.py"],
)
def test_a_model_of_mmdetection(config: str) -> None:
    """In a process of its own: mmdetection can be imported only after patching once."""
    (package,) = find_spec("mmdet").submodule_search_locations  # type: ignore[union-attr, misc]
    path = f"{package}/.mim/configs/{config}"
    finished = subprocess.run([sys.executable, "-c", MMDETECTION, path], capture_output=True, text=True, check=False)
    assert finished.stdout.endswith("the same\n"), finished.stderr
