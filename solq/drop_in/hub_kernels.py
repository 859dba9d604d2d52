"""Serve the layer `MultiScaleDeformableAttention` of the package `kernels` of Hugging Face.

``solq.drop_in.hub_kernels.register()`` maps that layer to this project, without a download. After that,
``model.set_use_kernels(True)`` of transformers, or ``kernels.kernelize(model, mode=…)``, takes it from here. Models of
other attention, which are RT-DETRv2, D-FINE, DEIMv2, Mask2Former and OneFormer, are served by
`solq.drop_in.transformers`.
"""

import warnings
from importlib.metadata import version
from importlib.util import find_spec

from torch import nn

from solq.drop_in.attention import attention_layer
from solq.drop_in.patching import Versions

KNOWN_TO_WORK = Versions("kernels", "0.15", "0.17")


class MultiScaleDeformableAttention(nn.Module):
    """Replace the forward of a model's layer; it has no state, as `kernels` demands."""

    can_torch_compile = True
    has_backward = True

    forward = attention_layer


class _Repository:
    """Load the layer, as a repository of `kernels` does."""

    layer_name = "MultiScaleDeformableAttention"

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention


def register() -> None:
    """Map the layer on GPUs and the CPU, for `kernels` and, where installed, for transformers.

    Raises:
        ImportError: `kernels` is not installed, or too old.
    """
    KNOWN_TO_WORK.check()
    from kernels import register_kernel_mapping

    repository = _Repository()
    mapping = {repository.layer_name: {device: repository for device in ("cuda", "rocm", "cpu")}}
    register_kernel_mapping(mapping)
    if find_spec("transformers") is None:
        return
    from transformers.integrations import hub_kernels
    from transformers.utils import is_kernels_available

    if is_kernels_available():  # transformers registers its own mapping later, whenever a model asks for kernels
        hub_kernels.get_kernel_mapping_transformers().update(mapping)
    else:
        warnings.warn(
            f"transformers {version('transformers')} does not accept kernels {version('kernels')}, so its models keep "
            "their own attention: install the version that transformers asks for, or use solq.drop_in.transformers",
            stacklevel=2,
        )
