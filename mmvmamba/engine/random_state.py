"""The states of the random generators that a training draws from: Python's, NumPy's and PyTorch's global ones.

They are global because the transforms of mm* and every dropout draw from them; a generator of their own, as
Albumentations has one, is not seen here.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmvmamba.errors import CheckpointError, ConfigError

#: Words of the Mersenne twister, which both Python and NumPy use.
_TWISTER_WORDS = 624


class RandomState(NamedTuple):
    """A moment of all generators, in the form in which each of them hands it out.

    Attributes:
        python: Of ``random.getstate()``.
        numpy: Of ``np.random.get_state(legacy=False)``.
        torch: The generator of the CPU.
        cuda: The generator of the current CUDA device; None without CUDA, or where it was not asked for.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: Tensor | None


def take_random_state(*, with_cuda: bool = False) -> RandomState:
    """Return the present state of the generators.

    Args:
        with_cuda: Also that of the current CUDA device, if CUDA is in use.
    """
    cuda = torch.cuda.get_rng_state() if with_cuda and torch.cuda.is_initialized() else None
    state = np.random.get_state(legacy=False)  # noqa: NPY002 (the generator that the transforms of mm* use)
    if state["bit_generator"] != "MT19937":
        raise ConfigError(
            "NumPy's global random generator is not the Mersenne twister (MT19937) that it is by default, expected "
            "that one: its state is stored in checkpoints. Do not call np.random.set_bit_generator in a training."
        )
    return RandomState(random.getstate(), state, torch.get_rng_state(), cuda)


def put_random_state(state: RandomState) -> None:
    """Set the generators to a state that ``take_random_state`` returned."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)  # noqa: NPY002 (see take_random_state)
    torch.set_rng_state(state.torch)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Let the block draw from and seed the generators of Python, NumPy and the CPU, unnoticed by what follows."""
    state = take_random_state()
    try:
        yield
    finally:
        put_random_state(state)


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and the CPU with a number of 64 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 (see take_random_state)
    # torch.manual_seed would seed CUDA as well, whose state nobody puts back.
    torch.default_generator.manual_seed(seed)


def mix_seed(*numbers: int) -> int:
    """Return 64 bits that depend on all of ``numbers`` and their order, the same on every machine."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def to_tensors(state: RandomState) -> dict[str, Tensor]:
    """Return a state as tensors of fixed shapes, which can be gathered from all ranks and stored in a checkpoint.

    ``python`` and ``numpy`` are int64: the 624 words and the position of the twister, then whether a Gaussian number
    is in store and its bits. ``torch`` and ``cuda`` (absent without CUDA) are PyTorch's own bytes.
    """
    _, words, gauss = state.python
    twister = state.numpy["state"]
    gauss_in_store = state.numpy["gauss"] if state.numpy["has_gauss"] else None
    tensors = {
        "python": torch.tensor([*words, *_from_optional_float(gauss)], dtype=torch.int64),
        "numpy": torch.tensor(
            [*twister["key"].tolist(), twister["pos"], *_from_optional_float(gauss_in_store)], dtype=torch.int64
        ),
        "torch": state.torch,
    }
    return tensors if state.cuda is None else {**tensors, "cuda": state.cuda}


def from_tensors(tensors: Mapping[str, Tensor]) -> RandomState:
    """Return the state that ``to_tensors`` was given.

    Raises:
        CheckpointError: If the tensors are not of its shapes and types.
    """
    words = _TWISTER_WORDS + 3
    for name, length, dtype in (
        ("python", words, torch.int64),
        ("numpy", words, torch.int64),
        ("torch", torch.get_rng_state().numel(), torch.uint8),
    ):
        found = tensors.get(name)
        if not isinstance(found, Tensor) or found.shape != (length,) or found.dtype != dtype:
            what = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(
                f"the checkpoint's random state of {name} is {what}, expected {(length,)} {dtype}. It is of another "
                "release of PyTorch or mmvmamba: resume with the one that wrote it, or delete random_states from it."
            )
    python, numpy = tensors["python"].tolist(), tensors["numpy"].tolist()
    for name, numbers in (("python", python), ("numpy", numpy)):
        # NumPy does not look at the position, and would read beyond its words.
        if not 0 <= numbers[_TWISTER_WORDS] <= _TWISTER_WORDS or not all(
            0 <= word < 1 << 32 for word in numbers[:_TWISTER_WORDS]
        ):
            raise CheckpointError(
                f"the checkpoint's random state of {name} is no state of a Mersenne twister (position "
                f"{numbers[_TWISTER_WORDS]}), expected words of 32 bits and a position up to {_TWISTER_WORDS}. The "
                "checkpoint is damaged: resume from another one."
            )
    gauss = _to_optional_float(numpy[-2:])
    return RandomState(
        python=(3, tuple(python[:-2]), _to_optional_float(python[-2:])),
        numpy={
            "bit_generator": "MT19937",
            "state": {"key": np.array(numpy[:_TWISTER_WORDS], dtype=np.uint32), "pos": numpy[_TWISTER_WORDS]},
            "has_gauss": int(gauss is not None),
            "gauss": gauss or 0.0,
        },
        # Clones: set_rng_state of PyTorch 2.11 reads from the beginning of the storage, even of a part of a tensor.
        torch=tensors["torch"].cpu().clone(),
        cuda=tensors["cuda"].cpu().clone() if "cuda" in tensors else None,
    )


def _from_optional_float(value: float | None) -> tuple[int, int]:
    return (0, 0) if value is None else (1, struct.unpack("<q", struct.pack("<d", value))[0])


def _to_optional_float(words: list[int]) -> float | None:
    return struct.unpack("<d", struct.pack("<q", words[1]))[0] if words[0] else None
