"""The feature pyramid: what each level sees, and its initial values."""

import torch
import torch.nn.functional as F

from solq.models.backbones.fpn import FeaturePyramid


def test_levels_are_sums_of_projected_features_from_coarse_to_fine() -> None:
    torch.manual_seed(0)
    fpn = FeaturePyramid([8, 16, 24], 12)
    c3, c4, c5 = torch.randn(2, 8, 12, 18), torch.randn(2, 16, 6, 9), torch.randn(2, 24, 3, 5)  # 9 is not 2 · 5
    lateral3, lateral4, lateral5 = fpn.lateral_convs
    p5 = lateral5(c5)
    p4 = lateral4(c4) + F.interpolate(p5, size=(6, 9))
    p3 = lateral3(c3) + F.interpolate(p4, scale_factor=2)
    expected = [conv(x) for conv, x in zip(fpn.output_convs, (p3, p4, p5), strict=True)]
    torch.testing.assert_close(fpn([c3, c4, c5]), expected, atol=0, rtol=0)


def test_every_level_reads_the_coarsest_feature() -> None:
    fpn = FeaturePyramid([4, 4], 4)
    fine, coarse = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4, requires_grad=True)
    fpn([fine, coarse])[0][..., 0, 0].sum().backward()
    assert coarse.grad is not None
    # The 3×3 window at the corner reads the fine pixels 0 and 1 of both axes, which lie in the coarse pixel 0.
    assert (coarse.grad[0, 0] != 0).nonzero().tolist() == [[0, 0]]


def test_initial_values() -> None:
    torch.manual_seed(0)
    fpn = FeaturePyramid([64, 256], 256)
    for conv in [*fpn.lateral_convs, *fpn.output_convs]:
        assert conv.bias.count_nonzero() == 0
        fan_out, fan_in, *kernel = conv.weight.shape
        bound = (6 / ((fan_in + fan_out) * kernel[0] * kernel[1])) ** 0.5
        assert 0.99 * bound < conv.weight.abs().max() <= bound
