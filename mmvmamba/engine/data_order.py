"""A DataLoader that can begin anywhere in its pass over the data, with augmentation that depends on the place alone.

PyTorch's workers draw from generators that live as long as the worker, so what is drawn for an image depends on the
number of workers and on all that was loaded before; none of it can be brought back when a training is resumed.
MMEngine's ``worker_init_fn`` even starts every epoch with the same seeds. Here each sample is loaded under a seed of
its own, made of the training's seed, the rank, the pass and the position in the pass: the position, not the index,
since repeated augmentation draws an image several times in a pass.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mmvmamba.engine.random_state import (
    mix_seed,
    put_random_state,
    random_state_kept,
    seed_generators,
    take_random_state,
)
from mmvmamba.errors import ConfigError, DataError

# What the last number of a seed is for.
_ORDER, _SAMPLE = 0, 1


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """How far a training has come in its data.

    Attributes:
        iteration: Finished iterations.
        data_pass: Passes over the data that are complete; the number of the present one.
        batch: Finished batches of the present pass.
        validation_due: Whether the training has yet to look if it is time for a validation.
        sampler_seed: The ``seed`` of the sampler, or None if it has none.
        batch_size: Samples of a batch of one process, or None if the DataLoader does not say.
    """

    iteration: int = 0
    data_pass: int = 0
    batch: int = 0
    validation_due: bool = False
    sampler_seed: int | None = None
    batch_size: int | None = None


class Draw(NamedTuple):
    """What a worker is sent for one sample: its index in the data set (of the sampler's type) and its seed."""

    index: Any
    seed: int


class ResumableDataLoader(DataLoader[Any]):
    """What another DataLoader gives, in the same order, from any batch of any pass.

    ``dataset``, ``sampler`` and ``batch_sampler`` are those of the other one, so hooks that set the sampler's epoch,
    read the data set's ``metainfo`` or exchange its pipeline find what they look for; the seeds are added in a second
    DataLoader behind it.

    Args:
        loader: Built as the config says. Its sampler must not have been iterated over.
        rank: Of this process.

    Raises:
        ConfigError: If the data set is an iterable one or ``in_order`` is False: neither has an order to return to.
    """

    def __init__(self, loader: DataLoader[Any], rank: int) -> None:
        _check_order(loader)
        batched = {
            "batch_size": loader.batch_size,
            "sampler": loader.sampler,
            "drop_last": loader.drop_last,
        }
        own_batches = loader.batch_size is None and loader.batch_sampler is not None
        shared = {
            name: getattr(loader, name)
            for name in (
                "num_workers",
                "pin_memory",
                "timeout",
                "worker_init_fn",
                "multiprocessing_context",
                "prefetch_factor",
                "persistent_workers",
            )
        }
        super().__init__(
            loader.dataset,
            collate_fn=loader.collate_fn,
            **(dict(batch_sampler=loader.batch_sampler) if own_batches else batched),
            **shared,
        )
        in_batches = self.batch_sampler is not None
        order = _Order(self.batch_sampler if self.batch_sampler is not None else self.sampler, in_batches, rank)
        # Workers get a base seed when they are started. Drawn from the global generator, as is the default, the
        # number of workers would show in every random number that the training draws afterwards.
        behind: DataLoader[Any] = DataLoader(
            _SeededSamples(self.dataset, self.collate_fn),
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            **(dict(batch_sampler=order) if in_batches else dict(batch_size=None, sampler=order)),
            **shared,
        )
        self._order = order
        self._behind = behind

    def start_at(self, seed: int, data_pass: int, batch: int = 0) -> None:
        """Say where the next iteration over this DataLoader begins.

        The sampler is asked for the indices of the batches that are skipped, but nothing of them is loaded.

        Args:
            seed: Of the training.
            data_pass: Number of the pass over the data.
            batch: Batches of this pass to leave out.
        """
        self._order.start_at(seed, data_pass, batch)

    def __iter__(self) -> Any:
        # Hooks of mmdet and mmpretrain that exchange the pipeline set _iterator to None to have workers that persist
        # started anew.
        if self._iterator is None:
            self._behind._iterator = None
        iterator = iter(self._behind)
        self._iterator = iterator if self.persistent_workers else None
        return iterator

    @property
    def sampler_seed(self) -> int | None:
        """The seed from which the sampler shuffles, or None if it has none."""
        seed = getattr(self._seeded_sampler(), "seed", None)
        return seed if isinstance(seed, int) else None

    @property
    def samples_per_batch(self) -> int | None:
        """The number of samples of a batch, or None if batches are made by a sampler that does not say."""
        size = getattr(self.batch_sampler, "batch_size", self.batch_size)
        return size if isinstance(size, int) else None

    def restore_sampler_seed(self, seed: int) -> None:
        """Let the sampler shuffle as that of the interrupted training did."""
        sampler = self._seeded_sampler()
        sampler.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Let the sampler shuffle for another pass, if it knows of passes."""
        samplers: list[Any] = [self.sampler, getattr(self.batch_sampler, "sampler", None)]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
                return

    def _seeded_sampler(self) -> Any:
        inner = getattr(self.batch_sampler, "sampler", self.sampler)
        return inner if hasattr(inner, "seed") else self.batch_sampler


def _check_order(loader: DataLoader[Any]) -> None:
    way_out = "type='mmengine.EpochBasedTrainLoop' in train_cfg (or its Iter form) keeps MMEngine's own loop"
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            f"train_dataloader.dataset is {type(loader.dataset).__name__}, an IterableDataset, expected one with "
            f"indices: a resumed training could not find its place. Use another, or give that up: {way_out}."
        )
    if not loader.in_order:
        raise ConfigError(
            "train_dataloader.in_order is False, expected True: batches in the order in which workers happen to "
            f"finish cannot be repeated. Remove it, or give that up: {way_out}."
        )


class _Order:
    """The indices a sampler or batch sampler gives, with a seed for each."""

    def __init__(self, sampler: Any, in_batches: bool, rank: int) -> None:
        self._sampler = sampler
        self._in_batches = in_batches
        self._rank = rank
        self._start = (0, 0, 0)

    def start_at(self, seed: int, data_pass: int, batch: int) -> None:
        self._start = (seed, data_pass, batch)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Draw] | Draw]:
        # A generator: PyTorch's iterator over workers asks twice for an iterator and uses the second.
        seed, data_pass, skipped = self._start
        self._start = (seed, data_pass, 0)  # whoever iterates out of turn, as PreciseBNHook does, gets the whole pass
        # A sampler may draw from the global generators too (PyTorch's RandomSampler, mmdet's GroupMultiSourceSampler):
        # it gets a state of its own, apart from the training's and independent of how far ahead workers load.
        position = 0
        with random_state_kept():
            seed_generators(mix_seed(seed, self._rank, data_pass, 0, _ORDER))
            entries = iter(self._sampler)
            for _ in range(skipped):
                entry = next(entries, None)
                if entry is None:
                    return
                position += len(entry) if self._in_batches else 1
            own = take_random_state()
        while True:
            with random_state_kept():
                put_random_state(own)
                entry = next(entries, None)
                own = take_random_state()
            if entry is None:
                return
            indices = entry if self._in_batches else [entry]
            draws = [
                Draw(index, mix_seed(seed, self._rank, data_pass, number, _SAMPLE))
                for number, index in enumerate(indices, start=position)
            ]
            position += len(draws)
            yield draws if self._in_batches else draws[0]


class _SeededSamples(Dataset[Any]):
    """Loads samples, and makes a batch of them, under the seeds that the samples come with."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: Draw) -> Any:
        with random_state_kept():
            return self._collate(self._load(draw))

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        """Return a batch, already made: what collating draws follows from the last sample's seed."""
        with random_state_kept():
            return self._collate([self._load(draw) for draw in draws])

    def _load(self, draw: Draw) -> Any:
        seed_generators(draw.seed)
        try:
            return self._dataset[draw.index]
        except MemoryError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"sample {draw.index} of the training data{_file_of(self._dataset, draw.index)} cannot be loaded: "
                f"{type(error).__name__}: {error} (raised in {frame.filename}, line {frame.lineno}). Repair or remove "
                "the sample, or correct the step of the pipeline that fails."
            ) from error


def _file_of(dataset: Any, index: Any) -> str:
    """Return ``", file '...',"`` if the data set says which file a sample is read from."""
    info = None
    if hasattr(dataset, "get_data_info"):
        try:
            info = dataset.get_data_info(index)
        except Exception:  # noqa: BLE001 (what failed before may fail here; the first error is the one to report)
            info = None
    path = info.get("img_path") if isinstance(info, dict) else None
    return f", file {str(path)!r}," if path else ""


def _as_it_is(batch: Any) -> Any:
    return batch


def is_endless(sampler: Any) -> bool:
    """Return whether a sampler of mm* never comes to an end, though it has a length."""
    return hasattr(sampler, "skip") or hasattr(sampler, "source_ratio")
