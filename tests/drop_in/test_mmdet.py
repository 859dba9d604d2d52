"""mmdetection's Sparse R-CNN, and the dynamic convolution of QueryInst's masks, give the same when patched."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from solq.drop_in import mmdet as drop_in

needs_mmdet = pytest.mark.skipif(
    find_spec("mmdet") is None, reason="mmdetection is not installed: pip install mmdet==3.3.0 mmcv-lite==2.1.0"
)

# RoIAlign is torchvision's before patching: mmcv-lite has none.
SPARSE_RCNN = """
import sys
from solq.drop_in import mmdet as drop_in
from solq.kernels import use_backend

assert drop_in.patch() == [
    "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor.SingleRoIExtractor.forward",
    "mmdet.models.layers.transformer.utils.DynamicConv.forward",
]
drop_in.unpatch()
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

register_all_modules()
config = Config.fromfile(sys.argv[1]).model
config.update(data_preprocessor=None)
config.backbone.update(depth=18, init_cfg=None)
config.neck.in_channels = [64, 128, 256, 512]
config.rpn_head.num_proposals = 10
config.roi_head.bbox_roi_extractor.roi_layer.use_torchvision = True
torch.manual_seed(0)
model = MODELS.build(config).train()
model.init_weights()
with torch.no_grad():  # boxes of all levels
    sides = torch.tensor([0.2, 0.4, 0.7, 1.5, 0.3]).repeat(2)
    model.rpn_head.init_proposal_bboxes.weight.copy_(torch.stack([sides * 0 + 0.5] * 2 + [sides] * 2, dim=1))

size = (320, 416)
metainfo = dict(img_shape=size, batch_input_shape=size, ori_shape=size, scale_factor=(1, 1))
samples = [DetDataSample(metainfo=metainfo) for _ in range(2)]
boxes = torch.tensor([[5.0, 6, 150, 160], [30, 20, 290, 260]])
for sample in samples:
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 3]))
images = torch.rand(2, 3, *size)


def losses_and_gradients():
    losses = {name: loss for name, loss in model.loss(images, samples).items() if "loss" in name}
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
    return losses, {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}


theirs = losses_and_gradients()
for extractor in model.roi_head.bbox_roi_extractor:
    for layer in extractor.roi_layers:
        layer.use_torchvision = False  # with mmcv-lite an error, if it were called
with drop_in.patched(), use_backend("reference"):
    ours = losses_and_gradients()
torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
for name, gradient in theirs[1].items():
    error = (ours[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
    assert error < 5e-3, (name, error)
print("the same")
"""

DYNAMIC_CONV = """
import torch
from solq.drop_in import mmdet as drop_in
from solq.kernels import use_backend

drop_in.patch()
drop_in.unpatch()
from mmdet.models.layers import DynamicConv

torch.manual_seed(0)
for options in ({"with_proj": False}, {}, {"out_channels": 24}, {"act_cfg": dict(type="GELU")}):
    layer = DynamicConv(16, 8, input_feat_shape=3, **options)
    query, features = torch.randn(5, 16), torch.randn(5, 16, 3, 3)
    expected = layer(query, features)
    for backend in ("reference", "triton"):
        with drop_in.patched(), use_backend(backend):
            torch.testing.assert_close(layer(query, features), expected, rtol=1e-4, atol=1e-4)
print("the same")
"""


@needs_mmdet
def test_losses_and_gradients_of_sparse_rcnn() -> None:
    """In a process of its own: mmdetection can be imported only after patching once."""
    (package,) = find_spec("mmdet").submodule_search_locations  # type: ignore[union-attr, misc]
    path = f"{package}/.mim/configs/sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py"
    run(SPARSE_RCNN, path)


@needs_mmdet
def test_dynamic_convolution() -> None:
    run(DYNAMIC_CONV)


def run(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.stdout.endswith("the same\n"), finished.stderr


@pytest.mark.skipif(find_spec("mmdet") is not None, reason="mmdetection is installed")
def test_without_mmdetection() -> None:
    with pytest.raises(ImportError, match=r"^mmdet is not installed: mmdet 3\.3 to 3\.3 is known to work$"):
        drop_in.patch()
