import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solq.data.sampler import TrainSampler


def first(sampler: TrainSampler, n: int) -> list:
    return list(itertools.islice(sampler, n))


@settings(deadline=None, max_examples=50)
@given(num_samples=st.integers(1, 60), part=st.integers(1, 4), world_size=st.integers(1, 4), seed=st.integers(0, 9))
def test_processes_share_the_batch_of_one_process(num_samples: int, part: int, world_size: int, seed: int):
    batch_size = part * world_size
    whole = first(TrainSampler(num_samples, batch_size, seed), 12)
    parts = [
        first(TrainSampler(num_samples, batch_size, seed, rank=rank, world_size=world_size), 12)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert [key for of_rank in parts for key in of_rank[step]] == batch
        assert len({batch_seed for _, batch_seed in batch}) == 1


@settings(deadline=None, max_examples=50)
@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 9), start=st.integers(0, 40))
def test_a_run_continues_at_any_step(num_samples: int, batch_size: int, start: int):
    groups = np.arange(num_samples) % 3 == 0
    uninterrupted = first(TrainSampler(num_samples, batch_size, groups=groups), start + 5)
    resumed = first(TrainSampler(num_samples, batch_size, groups=groups, start_step=start), 5)
    assert resumed == uninterrupted[start:]


@settings(deadline=None, max_examples=50)
@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 70))
def test_an_epoch_shows_every_image(num_samples: int, batch_size: int):
    sampler = TrainSampler(num_samples, batch_size, groups=[i % 2 for i in range(num_samples)])
    shown = [index for batch in first(sampler, sampler.steps_per_epoch) for index, _ in batch]
    assert set(shown) == set(range(num_samples))
    assert len(shown) < num_samples + batch_size  # no image more often than it takes to fill the last batch


def test_epochs_and_seeds_differ():
    sampler = TrainSampler(100, 10)
    epochs = [[index for batch in first(sampler, 20)[k : k + 10] for index, _ in batch] for k in (0, 10)]
    assert epochs[0] != epochs[1]
    assert first(TrainSampler(100, 10, seed=1), 1) != first(sampler, 1)
    assert len({batch[0][1] for batch in first(sampler, 50)}) == 50  # and so does the augmentation of each step


def test_batches_are_of_one_group():
    groups = np.random.default_rng(0).integers(0, 2, 200)
    sampler = TrainSampler(200, 8, groups=groups)
    mixed = sum(
        len({int(groups[index]) for index, _ in batch}) > 1 for batch in first(sampler, sampler.steps_per_epoch)
    )
    assert mixed <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0, "batch_size": 2}, "nothing to train on"),
        ({"num_samples": 5, "batch_size": 3, "world_size": 2}, "batch_size is 3: .* multiple of the 2 processes"),
        ({"num_samples": 5, "batch_size": 0}, "batch_size is 0"),
        ({"num_samples": 5, "batch_size": 2, "groups": [0]}, "groups has 1 entries but num_samples is 5"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainSampler(**arguments)
