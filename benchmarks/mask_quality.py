"""Measure the quality of decoded masks: `python -m benchmarks.mask_quality COCO_FOLDER`.

Every instance of the validation split is cropped from the full-size mask by its box, encoded, decoded, and pasted back;
the IoU with the full-size mask is averaged, by number of coefficients n, side N of the crops, size of the object
(COCO's areas: below 32², below 96² pixels, larger), and coding. This is the IoU that a perfect prediction of the
vectors would reach (paper, Tables 3a, 3d and 3e). PCA and sparse coding are fitted to the training split's masks. The
program prints Markdown tables, and draws a chart and a grid of masks: black is kept, red is lost, blue is added.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor

from solq.data.annotations import split_paths
from solq.kernels import dct_decode_binary, dct_encode, paste_masks
from solq.kernels.reference import crop_masks
from solq.models.solq.mask_coding import FlatCoding, PCACoding, SparseCoding

COEFFICIENTS = (64, 100, 144, 196, 256, 324, 400)
SIZES = (64, 128, 256)
AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}

RoundTrip = Callable[[Tensor], Tensor]  # crops (K, N, N) bool to crops that were encoded and decoded


class Instances(NamedTuple):
    """The instances of one image."""

    masks: Tensor  # (K, H, W) bool
    boxes: Tensor  # (K, 4) in pixels


def read(folder: Path, split: str) -> list[Instances]:
    coco = COCO(str(split_paths(folder, split)[1]))
    images = []
    for image_id in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        annotations = [a for a in annotations if min(a["bbox"][2:]) > 0 and coco.annToMask(a).any()]
        if annotations:
            masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
            boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
            boxes[:, 2:] += boxes[:, :2]
            images.append(Instances(torch.from_numpy(masks).bool(), boxes))
    return images


def crops_of(images: list[Instances], size: int) -> list[Tensor]:
    return [crop_masks(image.masks, image.boxes, size) for image in images]


def ious(images: list[Instances], crops: list[Tensor], round_trip: RoundTrip) -> Tensor:
    """Compute the IoU (K,) of each full-size mask with its crop after `round_trip`, pasted back."""
    result = []
    for image, cropped in zip(images, crops, strict=True):
        pasted = paste_masks(round_trip(cropped), image.boxes, tuple(image.masks.shape[1:]))
        overlap, union = (pasted & image.masks).sum((1, 2)), (pasted | image.masks).sum((1, 2))
        result.append(overlap / union)
    return torch.cat(result)


def dct(crops: Tensor, n: int) -> Tensor:
    """Encode crops by n DCT coefficients and decode them."""
    return dct_decode_binary(dct_encode(crops, n), crops.shape[-1])


def fitted(coding: PCACoding | SparseCoding, crops: Tensor, n: int | None = None) -> Tensor:
    """Encode crops by the first n components of a fitted coding, or by all, and decode them."""
    vectors = coding.encode(crops)
    if n is not None:
        vectors = vectors.clone()
        vectors[:, n:] = 0
    return coding.binarize(coding.decode(vectors))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def draw_chart(
    curves: dict[str, list[float]], by_area: dict[str, list[float]], sparse: float, flat: float, path: Path
) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), sharey=True, layout="constrained")
    shades = {"DCT, N = 64": "#9ecae1", "DCT, N = 128": "#3182bd", "DCT, N = 256": "#08306b", "PCA, N = 128": "#e6550d"}
    for label, values in curves.items():
        left.plot(COEFFICIENTS, values, "o-", color=shades[label], markersize=4, label=label)
    left.plot(256, sparse, "D", color="#31a354", markersize=6, label="sparse coding, N = 128")
    left.axhline(flat, color="#969696", linestyle="--", label="flat, 28 × 28, n = 784")
    for (label, values), color in zip(by_area.items(), ("#bcbddc", "#807dba", "#54278f"), strict=True):
        right.plot(COEFFICIENTS, values, "o-", color=color, markersize=4, label=label)
    left.set(
        title="by side of the crops, and by coding",
        xlabel="length of the vector, n",
        ylabel="mean IoU with the full-size mask",
    )
    right.set(title="DCT, N = 128, by size of the object", xlabel="length of the vector, n")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="lower right", fontsize=8.5, labelspacing=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_grid(
    images: list[Instances], path: Path, rows: int = 6, shown: tuple[int, ...] = (16, 64, 144, 256, 400)
) -> None:
    """Draw intricate large objects, one per image and row: the mask, and its copies from n coefficients."""

    def intricacy(image: Instances, index: int) -> float:
        """Compute border length over the square root of the area; 0 for objects that are not large."""
        mask = image.masks[index]
        area = mask.sum().item()
        border = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
        return border.item() / area**0.5 if area > 96**2 else 0.0

    best = [max((intricacy(image, k), k) for k in range(len(image.masks))) for image in images]
    # Every fourth one, so that ordinary objects are among them.
    order = sorted(range(len(images)), key=lambda i: -best[i][0])[: 4 * rows : 4]
    figure, grid = plt.subplots(
        rows, len(shown) + 1, figsize=(1.75 * (len(shown) + 1), 1.75 * rows), layout="constrained"
    )
    for axes_of_row, i in zip(grid, order, strict=True):
        image, k = images[i], best[i][1]
        mask, box = image.masks[k], image.boxes[k]
        H, W = mask.shape
        # A square around the box.
        center, half = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max()) * 0.53
        limits = [center[0] - half, center[0] + half, center[1] + half, center[1] - half]
        picture = np.where(mask[..., None], 40, 245).astype(np.uint8).repeat(3, -1)
        pictures = [("mask", picture)]
        for n in shown:
            kept = paste_masks(dct(crop_masks(mask[None], box[None], 128), n), box[None], (H, W))[0]
            picture = np.full((H, W, 3), 245, np.uint8)
            picture[mask & kept] = (40, 40, 40)
            picture[mask & ~kept] = (222, 45, 38)
            picture[~mask & kept] = (49, 130, 189)
            iou = ((mask & kept).sum() / (mask | kept).sum()).item()
            pictures.append((f"n = {n}: {iou:.3f}", picture))
        for axes, (title, picture) in zip(axes_of_row, pictures, strict=True):
            axes.imshow(picture, interpolation="antialiased")
            axes.set(xlim=limits[:2], ylim=limits[2:], xticks=[], yticks=[])
            axes.set_title(title, fontsize=9)
            axes.set_facecolor("#f5f5f5")
            for spine in axes.spines.values():
                spine.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder in COCO's layout")
    parser.add_argument("--train-split", default="train2017", help="PCA and sparse coding are fitted to its masks")
    parser.add_argument("--val-split", default="val2017")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="where the pictures go")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    images = read(arguments.data, arguments.val_split)
    area = torch.cat([image.masks.sum((1, 2)) for image in images])
    of_size = {name: (area >= low) & (area < high) for name, (low, high) in AREAS.items()}
    print(f"\n{len(area)} masks: " + ", ".join(f"{which.sum()} {name}" for name, which in of_size.items()) + "\n")

    crops = {size: crops_of(images, size) for size in SIZES}
    uncoded = {size: ious(images, crops[size], lambda crop: crop).mean().item() for size in SIZES}
    scores = {(size, n): ious(images, crops[size], functools.partial(dct, n=n)) for size in SIZES for n in COEFFICIENTS}
    print("DCT, by side of the crops; the last column is the crop alone, pasted back without any coding\n")
    rows = [[str(s), *(f"{scores[s, n].mean():.4f}" for n in COEFFICIENTS), f"{uncoded[s]:.4f}"] for s in SIZES]
    print(table(["N", *(f"n = {n}" for n in COEFFICIENTS), "N²"], rows))
    print("DCT, N = 128, by size of the object\n")
    by_area = {name: [scores[128, n][which].mean().item() for n in COEFFICIENTS] for name, which in of_size.items()}
    print(
        table(
            ["objects", *(f"n = {n}" for n in COEFFICIENTS)],
            [[a, *(f"{v:.4f}" for v in vs)] for a, vs in by_area.items()],
        )
    )

    train = torch.cat(crops_of(read(arguments.data, arguments.train_split), 128))
    pca, sparse = PCACoding(max(COEFFICIENTS), 128), SparseCoding(256, 128)
    pca.fit(train)
    sparse.fit(train)
    pca_scores = {n: ious(images, crops[128], functools.partial(fitted, pca, n=n)) for n in COEFFICIENTS}
    sparse_scores = ious(images, crops[128], functools.partial(fitted, sparse))
    flat = FlatCoding(28)
    flat_scores = ious(images, crops_of(images, 28), lambda crop: flat.binarize(flat.decode(flat.encode(crop))))
    codings = {
        "DCT, N = 128, n = 256": scores[128, 256],
        f"PCA, N = 128, n = 256, fitted to {len(train)} masks": pca_scores[256],
        f"sparse coding, N = 128, n = 256, fitted to {len(train)} masks": sparse_scores,
        "flat, 28 × 28, n = 784": flat_scores,
    }
    print(f"PCA, N = 128, fitted to {len(train)} masks\n")
    print(
        table(["", *(f"n = {n}" for n in COEFFICIENTS)], [["all", *(f"{s.mean():.4f}" for s in pca_scores.values())]])
    )
    print("Codings\n")
    rows = [
        [name, f"{s.mean():.4f}", *(f"{s[which].mean():.4f}" for which in of_size.values())]
        for name, s in codings.items()
    ]
    print(table(["coding", "all", *AREAS], rows))

    curves = {f"DCT, N = {size}": [scores[size, n].mean().item() for n in COEFFICIENTS] for size in SIZES}
    curves["PCA, N = 128"] = [pca_scores[n].mean().item() for n in COEFFICIENTS]
    sparse_iou, flat_iou = sparse_scores.mean().item(), flat_scores.mean().item()
    draw_chart(curves, by_area, sparse_iou, flat_iou, arguments.output / "mask_quality.png")
    draw_grid(images, arguments.output / "mask_grid.png")


if __name__ == "__main__":
    main()
