"""The layer mapping of the package `kernels`: in `kernels` itself, and by transformers."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INSTALLED = "kernels" in packages_distributions()  # its specification would be found in the folder tests/kernels, too
needs_kernels = pytest.mark.skipif(not INSTALLED, reason="kernels is not installed: pip install kernels")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

# In a process of its own: transformers decides at import whether it uses `kernels`. Where it would not, for the bounds
# that it sets for its version, they are set aside, to run with the version that is installed.
KERNELIZED = """
import transformers.utils.import_utils as import_utils
if not import_utils.is_kernels_available():
    import_utils.is_kernels_available = lambda *bounds: True
    import transformers.utils
    transformers.utils.is_kernels_available = import_utils.is_kernels_available
import torch
import tiny_models
from solq.drop_in import hub_kernels
from solq.kernels import use_backend

torch.manual_seed(0)
model, inputs = tiny_models.deformable_detr()
theirs = model.eval()(**inputs)
hub_kernels.register()
model.set_use_kernels(True)
layers = [module for module in model.modules() if type(module).__name__ == "MultiScaleDeformableAttention"]
assert len(layers) == 3, layers
for layer in layers:
    assert layer.forward.__func__ is hub_kernels.MultiScaleDeformableAttention.forward, layer.forward
with use_backend("reference"):
    ours = model(**inputs)
torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
print("kernelized")
"""


@needs_kernels
@needs_transformers
def test_a_model_of_transformers_takes_the_layer_from_here() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", KERNELIZED], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert finished.stdout.endswith("kernelized\n"), finished.stderr


@needs_kernels
@needs_transformers
def test_transformers_that_does_not_accept_the_version_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from solq.drop_in import hub_kernels

    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: False)
    with pytest.warns(
        UserWarning, match=r"^transformers \S+ does not accept kernels \S+, so its models keep their own"
    ):
        hub_kernels.register()


@needs_kernels
@pytest.mark.filterwarnings("ignore:transformers .* does not accept kernels:UserWarning")
@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE"])
def test_kernelize_takes_the_layer_from_here(mode: str) -> None:
    import kernels

    from solq.drop_in import hub_kernels

    @kernels.use_kernel_forward_from_hub("MultiScaleDeformableAttention")
    class Attention(torch.nn.Module):
        def forward(self, value, shapes, shapes_list, level_start_index, locations, weights, im2col_step):
            raise AssertionError("its own forward was called")

    hub_kernels.register()
    model = kernels.kernelize(torch.nn.Sequential(Attention()), mode=kernels.Mode[mode], device="cpu")
    value = torch.rand(1, 6, 2, 4, requires_grad=True)
    shapes, starts = torch.tensor([(2, 3)]), torch.tensor([0])
    output = model[0](value, shapes, [(2, 3)], starts, torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3), 64)
    assert output.shape == (1, 5, 8)
    output.sum().backward()
    assert value.grad is not None


@pytest.mark.skipif(INSTALLED, reason="kernels is installed")
def test_without_kernels() -> None:
    from solq.drop_in import hub_kernels

    with pytest.raises(ImportError, match=r"^kernels is not installed: kernels 0\.15 to 0\.17 is known to work$"):
        hub_kernels.register()
