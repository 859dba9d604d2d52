"""Predict with a trained model: images of any kind, size and number to detections."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from solq.data.batch import Size, normalize, pad_images, padded_sizes, smallest_holding
from solq.data.image import ImageLike, expand_folders, folder_images, is_folder, read_rgb
from solq.data.transforms import View, resized, view_image
from solq.detections import Detections
from solq.devices import choose_device
from solq.errors import check_at_least
from solq.models.base import InstanceSegmenter
from solq.weights import check_length, load

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Prediction:
    """The result for one image: its pixels (3, H, W) uint8 and detections, or the error that prevented them.

    `source` is the file, or the position of an image that is no file.
    """

    source: Path | int
    image: Tensor | None = None
    detections: Detections | None = None
    error: Exception | None = None


class Predictor:
    """Find the objects in images, which threads decode and resize while the model computes.

    Args:
        model: a model, or the path of a file that :func:`solq.load` reads.
        device: where to compute; "auto" is the GPU if there is one.
        dtype: float32, or bfloat16 or float16 for automatic mixed precision.
        compile: compile the model, which takes minutes once for each of a few sizes of images.
        class_names: name of each label, instead of those that came with the model.
        size, max_size: images are resized to a shorter side of `size` pixels, or to a longer one of `max_size` if that
            is less; by default as in the evaluation of the model's training.
        batch_size: most images of a batch, which are of about the same size; by default 8 on a GPU, 1 on a CPU.
        workers: number of threads that decode.

    Raises:
        FileNotFoundError, ValueError: see :func:`solq.load`; a setting is out of its range; no such device.
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
        check_at_least(1, size=size, max_size=max_size, batch_size=batch_size, workers=workers)
        self.meta = model.meta
        if class_names is not None:
            self.meta = replace(model.meta, class_names=list(class_names))
            check_length("class_names", self.meta.class_names, model.config.num_classes)
        self.device = choose_device(device)
        self.dtype = dtype
        self.size, self.max_size = size or model.meta.eval_scale, max_size or model.meta.max_size
        self.batch_size = batch_size or (8 if self.device.type == "cuda" else 1)
        self.workers = workers
        self.model = model.to(self.device).eval()
        # A compiled model takes few sizes; otherwise images are padded as little as their batch allows.
        self._sizes = padded_sizes((self.size,), self.max_size) if compile else None
        self._forward: Callable[[Tensor, Tensor], dict[str, Any]] = self._compute
        if compile:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(self._sizes or ()))
            self._forward = torch.compile(self._compute, dynamic=False)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, threshold: float = 0.5, top_k: int = 100
    ) -> Detections | list[Detections | None]:
        """Find the objects in one image, or in each of several.

        Args:
            images: an image as :func:`solq.data.image.read_rgb` takes it, a folder, or several of these.
            threshold: the least score of a detection.
            top_k: the most detections of an image.

        Returns:
            Detections, best first, on the predictor's device; for a folder (by file name) or several images a list,
            with None for an image that cannot be used, which is logged.

        Raises:
            OSError, ValueError: the only image cannot be used, or a folder holds no image.
        """
        if is_folder(images):
            images = folder_images(Path(images))
        several = isinstance(images, Iterable) and not isinstance(images, str | bytes | np.ndarray | Tensor)
        several = several or getattr(images, "ndim", 0) == 4
        sources = images if several else [images]
        predictions = list(self.stream(sources, threshold=threshold, top_k=top_k))  # type: ignore[arg-type]
        for error in (prediction.error for prediction in predictions if prediction.error is not None):
            if not several:
                raise error
            logger.warning("%s", error)
        found = [prediction.detections for prediction in predictions]
        return found if several else found[0]  # type: ignore[return-value]

    def stream(self, images: Iterable[ImageLike], *, threshold: float = 0.5, top_k: int = 100) -> Iterator[Prediction]:
        """Yield the prediction for each of any number of images, in their order and as early as possible.

        The arguments are those of a call; folders are replaced by their images.

        Raises:
            ValueError: a number is out of its range.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, must be in 0..1")
        check_at_least(1, top_k=top_k)
        sources = enumerate(expand_folders(images))
        finished: dict[int, Prediction] = {}
        waiting: dict[Size, list[_Prepared]] = {}  # by padded size
        next_index = 0
        with ThreadPoolExecutor(self.workers) as pool:
            for prepared in map_ahead(pool, self._prepare, sources, self.workers + 2 * self.batch_size):
                if prepared.prediction.error is None:
                    batch = waiting.setdefault(self._padded(prepared.size), [])
                    batch.append(prepared)
                    if len(batch) < self.batch_size and sum(map(len, waiting.values())) < 4 * self.batch_size:
                        continue
                    if len(batch) < self.batch_size:  # many wait: the oldest image must not wait longer
                        batch = min(waiting.values(), key=lambda waiting_batch: waiting_batch[0].index)
                    del waiting[self._padded(batch[0].size)]
                    finished |= self._predict(batch, threshold, top_k)
                else:
                    finished[prepared.index] = prepared.prediction
                while next_index in finished:
                    yield finished.pop(next_index)
                    next_index += 1
        for batch in waiting.values():
            finished |= self._predict(batch, threshold, top_k)
        for index in sorted(finished):
            yield finished[index]

    def _prepare(self, source: tuple[int, ImageLike]) -> "_Prepared":
        """Decode and resize one image; runs in a thread."""
        index, image = source
        name = Path(image) if isinstance(image, str | Path) else index
        try:
            pixels = read_rgb(image)
        except (OSError, ValueError, TypeError) as error:
            described = error if isinstance(image, str | Path) else type(error)(f"image {index}: {error}")
            return _Prepared(index, Prediction(name, error=described))
        H, W = pixels.shape[-2:]
        small = view_image(pixels, View((0, 0, W, H), resized((H, W), self.size, self.max_size)))
        return _Prepared(index, Prediction(name, pixels), small, (small.shape[1], small.shape[2]))

    def _padded(self, size: Size) -> Size:
        """Return the size that an image is padded to at most; images are batched if it is the same."""
        H, W = size
        if self._sizes is None:
            return -(-H // 32) * 32, -(-W // 32) * 32
        return smallest_holding(H, W, self._sizes)

    def _predict(self, batch: "list[_Prepared]", threshold: float, top_k: int) -> dict[int, Prediction]:
        """Run the model on one batch, and return the predictions by the images' positions."""
        if self._sizes is not None and 1 < len(batch) < self.batch_size:  # compiled for one image and for full batches
            parts = [self._predict([prepared], threshold, top_k) for prepared in batch]
            return {index: prediction for part in parts for index, prediction in part.items()}
        heights, widths = zip(*(prepared.size for prepared in batch), strict=True)
        size = max(heights), max(widths)
        size = size if self._sizes is None else self._padded(size)
        images, padding_mask = pad_images([prepared.resized for prepared in batch], size)
        with torch.inference_mode():
            outputs = self._forward(images.to(self.device), padding_mask.to(self.device))
            orig_sizes = torch.tensor([prepared.prediction.image.shape[-2:] for prepared in batch])  # type: ignore[union-attr]
            detections = self.model.postprocess(outputs, orig_sizes, top_k, threshold)
        for prepared, found in zip(batch, detections, strict=True):
            prepared.prediction.detections = replace(found, meta=self.meta)
        return {prepared.index: prepared.prediction for prepared in batch}

    def _compute(self, images: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        """Compute the last layer's outputs for images (B, 3, H, W) uint8."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(normalize(images, padding_mask), padding_mask, last_layer_only=True)


@dataclass
class _Prepared:
    """An image that waits for its batch, with its pixels (3, h, w) uint8 for the model; or the error of reading it."""

    index: int
    prediction: Prediction
    resized: Tensor = field(default_factory=lambda: torch.empty(0))
    size: Size = (0, 0)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Any], T], arguments: Iterable[Any], count: int
) -> Iterator[T]:
    """Map `function` over `arguments` in the threads of a pool, which compute up to `count` results ahead."""
    rest = iter(arguments)
    futures: deque[Future[T]] = deque(pool.submit(function, argument) for argument in islice(rest, count))
    while futures:
        result = futures.popleft().result()
        futures.extend(pool.submit(function, argument) for argument in islice(rest, 1))
        yield result
