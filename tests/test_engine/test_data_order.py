"""The DataLoader behind the training loops: order, seeds, where it begins, and what it says when a sample fails."""

import collections
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.dataset import DefaultSampler, InfiniteSampler, pseudo_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from mmvmamba.engine.data_order import ResumableDataLoader
from mmvmamba.errors import ConfigError, DataError

SEED = 7


class Numbers(Dataset):
    """Each sample is its index and a random number of every library; ``loaded`` counts loads in this process."""

    def __init__(self, length=23):
        self.length = length
        self.loaded = collections.Counter()
        self.pipeline = "first"
        self.metainfo = {"classes": ("a",)}

    def __len__(self):
        return self.length

    def get_data_info(self, index):
        return {"img_path": f"folder/{index}.png", "width": 1 + index % 3, "height": 2}

    def __getitem__(self, index):
        self.loaded[index] += 1
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1))
        return {"index": index, "drawn": drawn, "pipeline": self.pipeline}


def _batches(loader, data_pass=0, batch=0, count=None):
    loader.set_epoch(data_pass)
    loader.start_at(SEED, data_pass, batch)
    iterator = iter(loader)
    return list(iterator) if count is None else [next(iterator) for _ in range(count)]


def _loader(dataset=None, sampler=DefaultSampler, workers=0, **options):
    dataset = Numbers() if dataset is None else dataset
    options.setdefault("collate_fn", pseudo_collate)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler(dataset, seed=3), num_workers=workers, **options)
    return ResumableDataLoader(loader, rank=0)


class Repeated(DefaultSampler):
    """Every index three times in a row, as repeated augmentation draws them."""

    def __iter__(self):
        return iter([index for index in super().__iter__() for _ in range(3)])

    def __len__(self):
        return 3 * super().__len__()


def _aspect_ratio(workers):
    batch_sampler = pytest.importorskip("mmdet.datasets.samplers").AspectRatioBatchSampler
    dataset = Numbers()
    sampler = batch_sampler(DefaultSampler(dataset, seed=3), 4)
    return ResumableDataLoader(
        DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=pseudo_collate), rank=0
    )


def _unbatched(workers):
    dataset = Numbers()
    loader = DataLoader(dataset, batch_size=None, sampler=DefaultSampler(dataset, seed=3), num_workers=workers)
    return ResumableDataLoader(loader, rank=0)


def _plain_torch(workers):
    return _loader(sampler=lambda dataset, seed: RandomSampler(dataset), workers=workers)


KINDS = {
    "default": lambda workers: _loader(workers=workers),
    "repeated": lambda workers: _loader(sampler=Repeated, workers=workers),
    "aspect ratio": _aspect_ratio,
    "unbatched": _unbatched,
    "sampler of PyTorch": _plain_torch,
    "dropped last": lambda workers: _loader(workers=workers, drop_last=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_pass_continues_at_any_batch(kind):
    for data_pass in (0, 1):
        whole = _batches(KINDS[kind](0), data_pass)
        assert len(whole) == len(KINDS[kind](0))
        for batch in range(len(whole) + 1):
            random.seed()
            torch.seed()
            assert _batches(KINDS[kind](0), data_pass, batch) == whole[batch:]
    assert _batches(KINDS[kind](0), 0) != whole


@pytest.mark.parametrize("kind", ["default", "aspect ratio", "unbatched", "sampler of PyTorch"])
def test_workers_change_nothing(kind):
    whole = _batches(KINDS[kind](0), 1)
    assert _batches(KINDS[kind](1), 1) == whole
    assert _batches(KINDS[kind](2), 1, 3) == whole[3:]


def test_endless_sampler_continues():
    whole = _batches(_loader(sampler=InfiniteSampler), count=30)
    assert len({index for batch in whole[:6] for index in batch["index"]}) == 23
    for batch in (1, 5, 6, 17):
        assert _batches(_loader(sampler=InfiniteSampler), 0, batch, count=5) == whole[batch : batch + 5]


def test_repeated_image_is_augmented_anew():
    first = _batches(KINDS["repeated"](0))[0]
    assert first["index"][0] == first["index"][1] == first["index"][2]
    assert len(set(first["drawn"][0][:3])) == 3


def test_every_pass_and_rank_has_its_own_seeds():
    dataset = Numbers(8)
    drawn = []
    for rank in (0, 1):
        loader = ResumableDataLoader(DataLoader(dataset, batch_size=8, collate_fn=pseudo_collate), rank=rank)
        drawn += [number for data_pass in (0, 1) for number in _batches(loader, data_pass)[0]["drawn"][0]]
    assert len(set(drawn)) == 32


def test_skipped_batches_are_not_loaded():
    dataset = Numbers()
    rest = _batches(_loader(dataset), 0, 4)
    assert sum(dataset.loaded.values()) == sum(len(batch["index"]) for batch in rest) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_no_trace_in_the_random_state(workers):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    _batches(_loader(workers=workers))
    _batches(_plain_torch(workers), 0, 2)
    assert states() == before


def test_what_is_random_in_collating_is_repeated():
    def collate(samples):
        return [sample["index"] for sample in samples], random.random(), torch.rand(2).tolist()

    whole = _batches(_loader(collate_fn=collate))
    assert _batches(_loader(collate_fn=collate, workers=1), 0, 2) == whole[2:]


def test_hooks_find_the_parts_they_know():
    loader = _loader()
    assert isinstance(loader.dataset, Numbers)
    assert isinstance(loader.sampler, DefaultSampler)
    assert (loader.batch_size, len(loader), loader.drop_last) == (4, 6, False)
    grouped = _aspect_ratio(0)
    assert grouped.batch_sampler.batch_size == 4
    grouped.set_epoch(5)
    assert grouped.batch_sampler.sampler.epoch == 5
    assert (loader.sampler_seed, grouped.sampler_seed) == (3, 3)
    grouped.restore_sampler_seed(11)
    assert grouped.batch_sampler.sampler.seed == 11


@pytest.mark.parametrize("persistent", [False, True])
def test_exchanged_pipeline_reaches_the_workers(persistent):
    """As PipelineSwitchHook of mmdet does it."""
    pytest.importorskip("mmdet")
    from mmdet.engine.hooks import PipelineSwitchHook

    class Runner:
        epoch = 1
        train_dataloader = _loader(workers=1, persistent_workers=persistent)
        logger = type("Logger", (), {"info": staticmethod(print)})

    assert _batches(Runner.train_dataloader)[0]["pipeline"] == ["first"] * 4
    hook = PipelineSwitchHook(switch_epoch=1, switch_pipeline=[])
    for _ in range(2):
        hook.before_train_epoch(Runner)
        second = _batches(Runner.train_dataloader, 1)
        assert type(second[0]["pipeline"][0]).__name__ == "Compose"
    assert Runner.train_dataloader._DataLoader__initialized


def test_persistent_workers_persist():
    loader = _loader(workers=1, persistent_workers=True)
    _batches(loader)
    first = loader._iterator
    assert _batches(loader, 1) == _batches(_loader(), 1)
    assert loader._iterator is first


def test_who_iterates_out_of_turn_gets_the_whole_pass():
    """PreciseBNHook does, in the middle of a training that was resumed."""
    loader = _loader()
    whole = _batches(loader, 2)
    assert _batches(loader, 2, 4) == whole[4:]
    assert list(loader) == whole


def test_data_without_an_order_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ConfigError, match=r"dataset is Stream, an IterableDataset.*'mmengine\.EpochBasedTrainLoop'"):
        ResumableDataLoader(DataLoader(Stream()), rank=0)
    with pytest.raises(ConfigError, match="in_order is False"):
        ResumableDataLoader(DataLoader(Numbers(), num_workers=1, in_order=False), rank=0)


class Failing(Numbers):
    """Fails at one index.

    Args:
        how: What happens there.
    """

    def __init__(self, how, info=True):
        super().__init__()
        self.how = how
        self.info = info

    def get_data_info(self, index):
        if not self.info:
            raise RuntimeError("nothing is known")
        return super().get_data_info(index)

    def __getitem__(self, index):
        if index == 13:
            self.how()
        return super().__getitem__(index)


def _raise():
    raise KeyError("gt_bboxes")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _hang():
    time.sleep(60)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_failing_sample_is_named(workers):
    begin = time.monotonic()
    with pytest.raises(DataError) as caught:
        _batches(_loader(Failing(_raise), workers=workers))
    assert "sample 13 of the training data, file 'folder/13.png', cannot be loaded: KeyError: 'gt_bboxes'" in str(
        caught.value
    )
    assert "test_data_order.py, line" in str(caught.value)
    assert time.monotonic() - begin < 30


def test_failing_sample_is_named_without_a_file():
    with pytest.raises(DataError, match=r"sample 13 of the training data cannot be loaded: KeyError"):
        _batches(_loader(Failing(_raise, info=False)))


def test_want_of_memory_stays_what_it_is():
    def exhaust():
        raise MemoryError

    with pytest.raises(MemoryError):
        _batches(_loader(Failing(exhaust)))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_worker_ends_the_training(workers):
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="killed by signal|exited unexpectedly"):
        _batches(_loader(Failing(_die), workers=workers))
    assert time.monotonic() - begin < 30


def test_hanging_worker_ends_the_training_after_the_timeout():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        _batches(_loader(Failing(_hang), workers=1, timeout=1))
    assert time.monotonic() - begin < 30
