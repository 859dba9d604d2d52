"""Choose the images of each training step, from the seed and the step alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]  # an image's index and the seed of its batch


@dataclass(eq=False)
class TrainSampler(Sampler[list[Key]]):
    """Yield endless batches of keys (index, batch seed), the same for any number of processes.

    An epoch shuffles the images and shows each once; its last batch is filled up with images of its beginning. The
    batch of a step depends on `seed` and the step only, so a run that starts at `start_step` continues another.

    Args:
        num_samples: number of images.
        batch_size: images of a step, over all processes.
        seed: seed of order and augmentation.
        rank, world_size: this process takes part `rank` of `world_size` equal parts of each batch.
        start_step: the first step.
        groups: a number per image; the images of a batch have the same number, except those left over in an epoch.
            With the orientations of the images as groups, batches need less padding.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError("num_samples is 0: there is nothing to train on")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a positive multiple of the {self.world_size} processes"
            )
        if self.groups is not None and len(self.groups) != self.num_samples:
            raise ValueError(f"groups has {len(self.groups)} entries but num_samples is {self.num_samples}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the images of every batch of an epoch: (steps, batch size) int64."""
        rng = np.random.default_rng((self.seed, 0, epoch))
        order = rng.permutation(self.num_samples)
        groups = np.zeros(self.num_samples, np.int64) if self.groups is None else np.asarray(self.groups)
        full, left = [], []
        for group in np.unique(groups):
            members = order[groups[order] == group]
            end = len(members) - len(members) % self.batch_size
            full.append(members[:end])
            left.append(members[end:])
        order = np.concatenate(full + left)
        batches = np.resize(order, (self.steps_per_epoch, self.batch_size))
        return rng.permutation(batches)

    def __iter__(self) -> Iterator[list[Key]]:
        part = self.batch_size // self.world_size
        epoch, position = divmod(self.start_step, self.steps_per_epoch)
        step = self.start_step
        while True:
            for batch in self.epoch(epoch)[position:]:
                batch_seed = int(np.random.SeedSequence((self.seed, 1, step)).generate_state(1, np.uint64)[0] >> 1)
                yield [(index, batch_seed) for index in batch[self.rank * part : (self.rank + 1) * part].tolist()]
                step += 1
            epoch, position = epoch + 1, 0
