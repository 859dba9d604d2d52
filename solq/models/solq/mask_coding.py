"""Mask codings: between the binary mask of an object in its box frame and the vector that a query predicts.

The four rows of the paper's Table 3a (section 3.2, mask compression coding). Each coding is a module whose buffers
hold what was fitted on a training set, so that they are part of a checkpoint and follow the model to its device.
"""

import warnings
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from solq.files import atomic_write
from solq.kernels import binarize, dct_decode, dct_decode_binary, dct_decode_paste, dct_encode, paste_masks, paste_runs

MaskCodingName = Literal["dct", "pca", "sparse", "flat"]


class MaskCoding(nn.Module):
    """The base class of the four codings.

    Attributes:
        name: the coding's name in the config.
        num_coefficients: length n of a vector, the width of the mask-vector head.
        size: side N of the masks.
    """

    name: ClassVar[MaskCodingName]

    def __init__(self, num_coefficients: int, size: int) -> None:
        super().__init__()
        if not 1 <= num_coefficients <= size**2:
            raise ValueError(f"num_coefficients is {num_coefficients}, must be 1 to {size**2} for {size}×{size} masks")
        self.num_coefficients = num_coefficients
        self.size = size

    def extra_repr(self) -> str:
        return f"num_coefficients={self.num_coefficients}, size={self.size}"

    def encode(self, masks: Tensor) -> Tensor:
        """Encode binary masks (K, N, N) as vectors (K, n) float32."""
        raise NotImplementedError

    def decode(self, vectors: Tensor) -> Tensor:
        """Decode vectors (K, n) to masks (K, N, N) float32, near 0 outside of the object and near 1 inside.

        Differentiable.
        """
        raise NotImplementedError

    def binarize(self, decoded: Tensor) -> Tensor:
        """Convert decoded masks (K, N, N) to bool.

        The linear codings are least-squares fits of 0 and 1, so that the threshold is one half.
        """
        return decoded > 0.5

    def decode_binary(self, vectors: Tensor) -> Tensor:
        """Decode vectors (K, n) to masks (K, N, N) bool."""
        return self.binarize(self.decode(vectors))

    def decode_paste(self, vectors: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Decode vectors (K, n) to full-image masks (K, H, W) bool in their boxes (K, 4), x0 y0 x1 y1 in pixels."""
        return paste_masks(self.decode_binary(vectors), boxes, image_size)

    def decode_runs(self, vectors: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode vectors (K, n) to the run lengths of `decode_paste`, see :func:`solq.kernels.paste_runs`."""
        return paste_runs(self.decode_binary(vectors), boxes, image_size)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Compute the mean absolute difference (T,) of each pair of vectors (T, n) (paper, equation 5)."""
        return (predicted.to(target.dtype) - target).abs().mean(-1)


class DCTCoding(MaskCoding):
    """The first n zigzag coefficients of the orthonormal 2-D DCT-II. Nothing is fitted."""

    name = "dct"

    def __init__(self, num_coefficients: int = 256, size: int = 128) -> None:
        super().__init__(num_coefficients, size)

    def encode(self, masks: Tensor) -> Tensor:
        return dct_encode(masks, self.num_coefficients)

    def decode(self, vectors: Tensor) -> Tensor:
        return dct_decode(vectors, self.size)

    def binarize(self, decoded: Tensor) -> Tensor:
        """Threshold each mask at the middle between its own minimum and maximum, as in the published model."""
        return binarize(decoded)

    def decode_binary(self, vectors: Tensor) -> Tensor:
        return dct_decode_binary(vectors, self.size)

    def decode_paste(self, vectors: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        return dct_decode_paste(vectors, boxes, image_size, self.size)


class FlatCoding(MaskCoding):
    """The mask's pixels themselves, at a low resolution: n = N². The vector holds pixel values, not logits."""

    name = "flat"

    def __init__(self, size: int = 28) -> None:
        super().__init__(size**2, size)

    def encode(self, masks: Tensor) -> Tensor:
        return masks.flatten(1).float()

    def decode(self, vectors: Tensor) -> Tensor:
        return vectors.float().view(-1, self.size, self.size)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Compute L2 plus dice (T,) of each pair of vectors (T, n) (paper, Table 3a).

        L2 is the mean squared difference. Dice has squares in its denominator (V-Net, Milletari et al. 2016), which is
        least at the target for any real values: a sigmoid would make the vector something else than the mask it codes.
        """
        predicted = predicted.to(target.dtype)
        l2 = (predicted - target).square().mean(-1)
        overlap = (predicted * target).sum(-1)
        dice = 1 - (2 * overlap + 1) / (predicted.square().sum(-1) + target.square().sum(-1) + 1)
        return l2 + dice


class FittedCoding(MaskCoding):
    """A mask is a mean plus a weighted sum of n images learned from a training set; the weights are its vector."""

    components: Tensor  # (n, N²), all zero until fitted
    mean: Tensor  # (N²,)

    def __init__(self, num_coefficients: int = 256, size: int = 128) -> None:
        super().__init__(num_coefficients, size)
        self.register_buffer("components", torch.zeros(num_coefficients, size**2))
        self.register_buffer("mean", torch.zeros(size**2))
        self.fitted = False  # on the host: asking a buffer would wait for the device
        self.register_load_state_dict_post_hook(_note_fitted)

    def fit(self, masks: Tensor, seed: int = 0) -> None:
        """Learn the buffers from masks (K, N, N), at least n of them."""
        raise NotImplementedError

    def decode(self, vectors: Tensor) -> Tensor:
        self._require_fitted()
        with torch.autocast(vectors.device.type, enabled=False):
            return (self.mean + vectors.float() @ self.components).view(-1, self.size, self.size)

    def _project(self, masks: Tensor) -> Tensor:
        """Multiply the centered masks with each component (K, n), in float64: neither TF32 nor autocast round it."""
        return (masks.flatten(1).double() - self.mean) @ self.components.double().T

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(
                f"{self.name} mask coding is not fitted: run `solq fit-coding --coding {self.name}` on a training set, "
                "then solq.models.solq.mask_coding.load"
            )

    def _require_enough(self, masks: Tensor) -> None:
        if masks.shape[1:] != (self.size, self.size):
            raise ValueError(f"masks have shape {tuple(masks.shape)}, must be (K, {self.size}, {self.size})")
        if len(masks) < self.num_coefficients:
            raise ValueError(
                f"{len(masks)} masks cannot fit {self.num_coefficients} coefficients: "
                "give at least as many masks, or lower num_coefficients"
            )


def _note_fitted(coding: FittedCoding, _: object) -> None:
    coding.fitted = bool(coding.components.any())


class PCACoding(FittedCoding):
    """Principal components P of the training masks, v = (m − mean) P (paper, equation 4).

    The equation leaves the mean out; it is subtracted here, as principal components are defined and as MEInst does:
    for the same n the reconstruction error can only be smaller.
    """

    name = "pca"

    def encode(self, masks: Tensor) -> Tensor:
        self._require_fitted()
        return self._project(masks).float()

    @torch.no_grad()
    def fit(self, masks: Tensor, seed: int = 0) -> None:
        """Find the components by randomized subspace iteration, in float64; the N²×N² covariance never exists.

        Source: Halko et al., Finding structure with randomness, SIAM Review 2011.
        """
        self._require_enough(masks)
        device = self.components.device
        chunks = masks.flatten(1).split(1024)
        total = torch.stack([chunk.sum(0, dtype=torch.float64) for chunk in chunks]).sum(0)
        mean = (total / len(masks)).to(device)

        def covariance_times(basis: Tensor) -> Tensor:
            product = torch.zeros_like(basis)
            for chunk in chunks:
                centered = chunk.to(device, torch.float64) - mean
                product += centered.T @ (centered @ basis)
            return product

        width = min(self.num_coefficients + 32, self.size**2)  # a wider subspace converges faster
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(self.size**2, width, generator=generator, dtype=torch.float64).to(device)
        for _ in range(6):
            basis = torch.linalg.qr(covariance_times(basis)).Q
        _, rotation = torch.linalg.eigh(basis.T @ covariance_times(basis))  # ascending
        self.components.copy_((basis @ rotation.flip(1)[:, : self.num_coefficients]).T)
        self.mean.copy_(mean)
        self.fitted = True


class SparseCoding(FittedCoding):
    """A sparse combination of n learned atoms of unit norm: the vector minimizes a Lasso (paper, equation 3).

    ½ ‖m − vD‖² + β ‖v‖₁, without a mean. The dictionary D is learned by scikit-learn (`pip install solq[sparse]`);
    encoding is plain PyTorch on any device, so that training needs no scikit-learn.
    """

    name = "sparse"
    gram: Tensor  # (n, n), D Dᵀ
    beta: Tensor  # ()
    step: Tensor  # (), one over the largest eigenvalue of the Gram matrix

    def __init__(self, num_coefficients: int = 256, size: int = 128, beta: float = 1.0) -> None:
        super().__init__(num_coefficients, size)
        self.register_buffer("gram", torch.zeros(num_coefficients, num_coefficients))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("step", torch.tensor(0.0))

    @torch.no_grad()
    def encode(self, masks: Tensor, iterations: int = 300) -> Tensor:
        """Minimize the Lasso of each mask by FISTA, whose momentum restarts where it points uphill.

        The number of iterations is fixed, so that nothing waits for the device.
        Source: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, SIAM J. Imaging Sciences 2009.
        """
        self._require_fitted()
        correlation, gram = self._project(masks), self.gram.double()
        vectors = ahead = torch.zeros_like(correlation)
        momentum = correlation.new_ones(len(masks), 1)
        for _ in range(iterations):
            moved = ahead - self.step * (ahead @ gram - correlation)
            shrunk = moved.sign() * (moved.abs() - self.step * self.beta).clamp(min=0)
            uphill = ((ahead - shrunk) * (shrunk - vectors)).sum(1, keepdim=True) > 0
            momentum = torch.where(uphill, 1.0, momentum)
            next_momentum = (1 + (1 + 4 * momentum**2).sqrt()) / 2
            ahead = shrunk + (momentum - 1) / next_momentum * (shrunk - vectors)
            vectors, momentum = shrunk, next_momentum
        return vectors.float()

    @torch.no_grad()
    def fit(self, masks: Tensor, seed: int = 0, epochs: int = 10) -> None:
        """Learn the dictionary online by scikit-learn, with the same β as the encoder.

        Source: Mairal et al., Online dictionary learning for sparse coding, ICML 2009.
        """
        try:
            from sklearn.decomposition import MiniBatchDictionaryLearning
            from sklearn.exceptions import ConvergenceWarning
        except ImportError as error:
            raise ImportError("fitting the sparse mask coding needs scikit-learn: pip install solq[sparse]") from error
        self._require_enough(masks)
        learning = MiniBatchDictionaryLearning(
            self.num_coefficients,
            alpha=float(self.beta),
            max_iter=epochs,
            fit_algorithm="cd",
            transform_max_iter=100,
            batch_size=256,
            random_state=seed,
        )
        with warnings.catch_warnings():  # the dictionary has to converge, not the codes of every batch on the way
            warnings.simplefilter("ignore", ConvergenceWarning)
            learning.fit(masks.flatten(1).float().cpu().numpy())
        atoms = torch.from_numpy(learning.components_).double()
        atoms /= atoms.norm(dim=1, keepdim=True)  # scikit-learn keeps norms of at most 1
        gram = atoms @ atoms.T
        self.components.copy_(atoms)
        self.gram.copy_(gram)
        self.step.copy_(1 / torch.linalg.matrix_norm(gram, ord=2))
        self.fitted = True


def build_mask_coding(
    name: MaskCodingName, num_coefficients: int | None = None, size: int | None = None
) -> DCTCoding | PCACoding | SparseCoding | FlatCoding:
    """Build the coding of that name, not fitted yet.

    Args:
        num_coefficients: length n of a vector; None is 256, the paper's.
        size: side N of the masks; None is 128, the paper's, and 28 for the flat coding.

    Raises:
        ValueError: if there is no such coding, or it cannot have that many coefficients.
    """
    n, N = num_coefficients or 256, size or 128
    match name:
        case "dct":
            return DCTCoding(n, N)
        case "pca":
            return PCACoding(n, N)
        case "sparse":
            return SparseCoding(n, N)
        case "flat":
            flat = FlatCoding(size or 28)
            if num_coefficients not in (None, flat.num_coefficients):
                raise ValueError(
                    f"num_coefficients is {num_coefficients}, must be {flat.num_coefficients} "
                    f"for the flat coding of {flat.size}×{flat.size} masks"
                )
            return flat
    raise ValueError(f"mask coding is {name!r}, must be 'dct', 'pca', 'sparse' or 'flat'")


def save(coding: PCACoding | SparseCoding, path: str | Path) -> None:
    """Write a fitted coding to a safetensors file. A file of that name is replaced only by a complete one."""
    coding._require_fitted()
    tensors = {key: value.contiguous().cpu() for key, value in coding.state_dict().items()}
    with atomic_write(path) as file:
        file.write(serialize(tensors, {"mask_coding": coding.name, "size": str(coding.size)}))


def load(path: str | Path) -> PCACoding | SparseCoding:
    """Read a fitted coding from a file of :func:`save`. No code from the file is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a fitted mask coding.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): run `solq fit-coding` again") from error
    if metadata.get("mask_coding") not in ("pca", "sparse"):
        raise ValueError(f"{path} holds no fitted mask coding: run `solq fit-coding` to make one")
    fitted = PCACoding if metadata["mask_coding"] == "pca" else SparseCoding
    coding = fitted(len(tensors["components"]), int(metadata["size"]))
    coding.load_state_dict(tensors)
    return coding
