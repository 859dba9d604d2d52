"""A trained model at work: images of any kind, size and number to detections."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from solq.data.batch import Size, normalize, padded_sizes
from solq.data.image import rgb_pixels
from solq.data.transforms import View, resized, view_image
from solq.detections import Detections
from solq.devices import choose_device
from solq.models.base import InstanceSegmenter
from solq.weights import check_length, load

logger = logging.getLogger(__name__)

ImageLike = str | Path | Image.Image | NDArray[Any] | Tensor

T = TypeVar("T")

# Endings of files that Pillow knows, but reads no pixels of by itself.
NO_PIXELS = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".eps", ".ps", ".wmf", ".emf"}


@dataclass
class Prediction:
    """What became of one image: either its pixels (3, H, W) uint8 and detections, or the error that says why not.

    `source` is the file, or the position of an image that came without one.
    """

    source: Path | int
    image: Tensor | None = None
    detections: Detections | None = None
    error: Exception | None = None


class Predictor:
    """Finds the objects of images.

    Files are decoded and resized by other threads while the model computes. Images of about the same size and form
    are computed together.

    Args:
        model: a model, or the path of a file that :func:`solq.load` reads.
        device: where to compute; "auto" is the GPU if there is one.
        dtype: float32, or bfloat16 or float16 for automatic mixed precision.
        compile: compile the model, which takes minutes once for each of a few sizes of images.
        class_names: name of each label, instead of those that came with the model.
        size, max_size: images are resized to a shorter side of `size` pixels, or to a longer one of `max_size` if that
            is less; as the model was evaluated in training unless given.
        batch_size: most images computed at once; 8 on a GPU, 1 on a CPU unless given.
        workers: threads that decode.

    Raises:
        FileNotFoundError, ValueError: see :func:`solq.load`; class names of another number than the model's classes;
            a number below 1; no such device.
    """

    def __init__(
        self,
        model: InstanceSegmenter | str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        class_names: Sequence[str] | None = None,
        size: int | None = None,
        max_size: int | None = None,
        batch_size: int | None = None,
        workers: int = 4,
    ) -> None:
        model = load(model) if isinstance(model, str | Path) else model
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}, must be torch.float32, torch.bfloat16 or torch.float16")
        for name, number in (("size", size), ("max_size", max_size), ("batch_size", batch_size), ("workers", workers)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, must be at least 1")
        self.meta = model.meta
        if class_names is not None:
            if not class_names:
                raise ValueError(
                    f"class_names is empty but the model has {model.config.num_classes} classes: give one for each"
                )
            check_length("class_names", list(class_names), model.config.num_classes)
            self.meta = replace(model.meta, class_names=list(class_names))
        self.device = choose_device(device)
        self.dtype = dtype
        self.size, self.max_size = size or model.meta.eval_scale, max_size or model.meta.max_size
        self.batch_size = batch_size or (8 if self.device.type == "cuda" else 1)
        self.workers = workers
        self.model = model.to(self.device).eval()
        # A compiled model sees a few sizes only; else the padding is what the images of a batch need.
        self._sizes = padded_sizes((self.size,), self.max_size) if compile else None
        self._forward: Callable[[Tensor, Tensor], dict[str, Any]] = self._compute
        if compile:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(self._sizes or ()))
            self._forward = torch.compile(self._compute, dynamic=False)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, threshold: float = 0.5, top_k: int = 100
    ) -> Detections | list[Detections | None]:
        """The objects of one image, or of each of several.

        Args:
            images: a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16, or floats in 0..1, a
                tensor (3, H, W) or (1, H, W) of the same types, all RGB; or a folder, or several of these.
            threshold: the least score of a detection.
            top_k: the most detections of an image.

        Returns:
            Detections, best first, on the predictor's device; for a folder (by file name) or several images a list,
            in which an image that cannot be used has None. The log says why.

        Raises:
            OSError, ValueError: if the only image cannot be used, or a folder holds no image.
        """
        if is_folder(images):
            images = folder_images(Path(images))
        several = isinstance(images, Iterable) and not isinstance(images, str | bytes | np.ndarray | Tensor)
        several = several or getattr(images, "ndim", 0) == 4
        sources = images if several else [images]
        predictions = list(self.stream(sources, threshold=threshold, top_k=top_k))  # type: ignore[arg-type]
        if not several:
            (only,) = predictions
            if only.error is not None:
                raise only.error
            assert only.detections is not None
            return only.detections
        for prediction in predictions:
            if prediction.error is not None:
                logger.warning("%s", prediction.error)
        return [prediction.detections for prediction in predictions]

    def stream(self, images: Iterable[ImageLike], *, threshold: float = 0.5, top_k: int = 100) -> Iterator[Prediction]:
        """What became of each image, in their order, as soon as it is known; for any number of images.

        Args:
            images: as for a call; folders among them are replaced by their images.

        Raises:
            ValueError: if a number is out of its range.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, must be in 0..1")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, must be at least 1")
        sources = enumerate(expand_folders(images))
        finished: dict[int, Prediction] = {}
        waiting: dict[Size, list[_Prepared]] = {}  # by the size that they are padded to
        following = 0
        with ThreadPoolExecutor(self.workers) as pool:
            for prepared in ahead(pool, self._prepare, sources, self.workers + 2 * self.batch_size):
                if isinstance(prepared, _Prepared):
                    batch = waiting.setdefault(self._padded(prepared.size), [])
                    batch.append(prepared)
                    if len(batch) < self.batch_size and sum(map(len, waiting.values())) < 4 * self.batch_size:
                        continue
                    # Full, or so many wait that the oldest has to go.
                    if len(batch) < self.batch_size:
                        batch = min(waiting.values(), key=lambda of_size: of_size[0].index)
                    del waiting[self._padded(batch[0].size)]
                    finished |= self._predict(batch, threshold, top_k)
                else:
                    finished[prepared[0]] = prepared[1]
                while following in finished:
                    yield finished.pop(following)
                    following += 1
        for batch in waiting.values():
            finished |= self._predict(batch, threshold, top_k)
        for index in sorted(finished):
            yield finished[index]

    def _prepare(self, source: tuple[int, ImageLike]) -> "_Prepared | tuple[int, Prediction]":
        """Decode and resize one image, in a thread."""
        index, image = source
        name = Path(image) if isinstance(image, str | Path) else index
        try:
            pixels = read_rgb(image)
        except (OSError, ValueError, TypeError) as error:
            described = error if isinstance(image, str | Path) else type(error)(f"image {index}: {error}")
            return index, Prediction(name, error=described)
        H, W = pixels.shape[-2:]
        resized_pixels = view_image(pixels, View((0, 0, W, H), resized((H, W), self.size, self.max_size)))
        return _Prepared(index, name, pixels, resized_pixels)

    def _padded(self, size: Size) -> Size:
        """The size that an image of this size may be padded to: together with others, or always if compiled."""
        H, W = size
        if self._sizes is None:
            return -(-H // 32) * 32, -(-W // 32) * 32
        return min((s for s in self._sizes if s[0] >= H and s[1] >= W), key=lambda s: s[0] * s[1])

    def _predict(self, batch: "list[_Prepared]", threshold: float, top_k: int) -> dict[int, Prediction]:
        if self._sizes is not None and 1 < len(batch) < self.batch_size:  # compiled for one image and for full batches
            parts = [self._predict([prepared], threshold, top_k) for prepared in batch]
            return {index: prediction for part in parts for index, prediction in part.items()}
        heights, widths = zip(*(prepared.size for prepared in batch), strict=True)
        H, W = (max(heights), max(widths)) if self._sizes is None else self._padded((max(heights), max(widths)))
        images = torch.zeros(len(batch), 3, H, W, dtype=torch.uint8)
        padding_mask = torch.ones(len(batch), H, W, dtype=torch.bool)
        for b, prepared in enumerate(batch):
            h, w = prepared.size
            images[b, :, :h, :w] = prepared.resized
            padding_mask[b, :h, :w] = False
        with torch.inference_mode():
            outputs = self._forward(images.to(self.device), padding_mask.to(self.device))
            orig_sizes = torch.tensor([prepared.image.shape[-2:] for prepared in batch])
            detections = self.model.postprocess(outputs, orig_sizes, top_k, threshold)
        return {
            prepared.index: Prediction(prepared.source, prepared.image, replace(found, meta=self.meta))
            for prepared, found in zip(batch, detections, strict=True)
        }

    def _compute(self, images: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        """Return the last layer's outputs for images (B, 3, H, W) uint8."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(normalize(images, padding_mask), padding_mask, last_layer_only=True)


@dataclass
class _Prepared:
    index: int
    source: Path | int
    image: Tensor  # (3, H, W) uint8
    resized: Tensor  # (3, h, w) uint8

    @property
    def size(self) -> Size:
        return self.resized.shape[1], self.resized.shape[2]


def ahead(pool: ThreadPoolExecutor, function: Callable[[Any], T], arguments: Iterable[Any], count: int) -> Iterator[T]:
    """`map(function, arguments)` by the threads of a pool, which are up to `count` results ahead."""
    rest = iter(arguments)
    futures: deque[Future[T]] = deque(pool.submit(function, argument) for argument in islice(rest, count))
    while futures:
        result = futures.popleft().result()
        futures.extend(pool.submit(function, argument) for argument in islice(rest, 1))
        yield result


def is_folder(image: object) -> TypeGuard[str | Path]:
    return isinstance(image, str | Path) and Path(image).is_dir()


def expand_folders(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """The images, with folders replaced by the image files that lie in them, by name. An empty folder remains."""
    for image in images:
        if is_folder(image):
            yield from _image_files(Path(image)) or [Path(image)]
        else:
            yield image


def folder_images(folder: Path) -> list[Path]:
    """The files in a folder whose names end as those of images do, by name.

    Raises:
        ValueError: if there are none.
    """
    files = _image_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no images: name another folder")
    return files


def _image_files(folder: Path) -> list[Path]:
    endings = Image.registered_extensions().keys() - NO_PIXELS
    files = (path for path in folder.iterdir() if path.suffix.lower() in endings and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def read_rgb(image: ImageLike) -> Tensor:
    """An image of any kind as RGB (3, H, W) uint8, turned as its EXIF entry says.

    Of images with more than 8 bits the upper 8 remain; transparency is dropped.

    Raises:
        OSError: a file is missing, damaged or no image.
        ValueError, TypeError: an array has another shape or type than a call of :class:`Predictor` takes.
    """
    if is_folder(image):
        folder_images(Path(image))
        raise ValueError(f"{image} is a folder, where one image is wanted")
    if isinstance(image, str | Path | Image.Image):
        given = isinstance(image, Image.Image)
        try:
            with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
                return rgb_pixels(ImageOps.exif_transpose(opened))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{image}: no such file") from error
        except Exception as error:  # Pillow's readers raise anything
            reason = (str(error) or repr(error)).splitlines()[0]
            raise OSError(f"{'it' if given else image} cannot be read as an image ({reason})") from error
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(f"an array has shape {image.shape}, must be (H, W), (H, W, 3) or (H, W, 4)")
        pixels = torch.from_numpy(np.array(image if image.ndim == 3 else image[:, :, None]))  # may be read-only
        return _to_rgb(pixels.permute(2, 0, 1))
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"a tensor has shape {tuple(image.shape)}, must be (3, H, W) or (1, H, W)")
        return _to_rgb(image.detach().cpu())
    raise TypeError(f"an image is a {type(image).__name__}, must be a path, a PIL image, an array or a tensor")


def _to_rgb(pixels: Tensor) -> Tensor:
    """Pixels (1, 3 or 4, H, W) of any accepted type as (3, H, W) uint8."""
    if pixels.shape[0] not in (1, 3, 4) or 0 in pixels.shape:
        C, H, W = pixels.shape
        raise ValueError(
            f"it has {C} channels of {H}x{W} pixels, must have 1, 3 or 4: arrays are (H, W, channels), tensors "
            "(channels, H, W)"
        )
    if pixels.dtype == torch.uint16:
        pixels = (pixels.to(torch.int32) >> 8).to(torch.uint8)
    elif pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(f"its values reach from {pixels.min():g} to {pixels.max():g}, floats must be in 0..1")
        pixels = (pixels * 255).round().to(torch.uint8)
    elif pixels.dtype == torch.bool:
        pixels = pixels.to(torch.uint8) * 255
    elif pixels.dtype != torch.uint8:
        raise TypeError(f"its type is {pixels.dtype}, must be uint8, uint16 or float")
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
