"""Random states survive a checkpoint; seeds of samples are what they were in every release."""

import contextlib
import random

import numpy as np
import pytest
import torch

from mmvmamba.engine.random_state import (
    from_tensors,
    mix_seed,
    put_random_state,
    random_state_kept,
    seed_generators,
    take_random_state,
    to_tensors,
)
from mmvmamba.errors import CheckpointError, ConfigError


def _draw():
    return (
        [random.random() for _ in range(700)],
        random.gauss(0, 1),
        np.random.rand(700).tolist(),
        np.random.normal(),
        torch.rand(700).tolist(),
        torch.randn(1).item(),
    )


@pytest.mark.parametrize("gauss_in_store", [False, True])
@pytest.mark.parametrize("words_used", [0, 1, 623, 624])
def test_state_survives_tensors(words_used, gauss_in_store):
    seed_generators(words_used)
    for _ in range(words_used):
        random.getrandbits(32)
        np.random.randint(0, 2**32, dtype=np.uint32)
    if gauss_in_store:  # both compute two numbers at a time and keep the second
        random.gauss(0, 1)
        np.random.normal()
        torch.randn(1)
    state = take_random_state()
    expected = _draw()
    # The second of two ranks: PyTorch reads the state of the first, or crashes, if it is given this view.
    tensors = {name: torch.stack([torch.zeros_like(tensor), tensor])[1] for name, tensor in to_tensors(state).items()}
    _draw()
    put_random_state(from_tensors(tensors))
    assert _draw() == expected


def test_tensors_of_another_shape_or_type_are_refused():
    good = to_tensors(take_random_state())
    for name, bad in (
        ("python", good["python"][:-1]),
        ("numpy", good["numpy"].float()),
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", None),
    ):
        with pytest.raises(CheckpointError, match=f"random state of {name} is"):
            from_tensors({**good, name: bad})


@pytest.mark.parametrize("name", ["python", "numpy"])
@pytest.mark.parametrize(("place", "value"), [(624, 625), (624, -1), (624, 10**9), (0, 1 << 32), (623, -1)])
def test_impossible_states_are_refused(name, place, value):
    """NumPy would read memory that is not its own."""
    tensors = to_tensors(take_random_state())
    tensors[name][place] = value
    with pytest.raises(CheckpointError, match=f"random state of {name} is no state of a Mersenne twister"):
        from_tensors(tensors)


def test_damaged_states_of_pytorch_raise_at_worst():
    good = torch.get_rng_state()
    for seed in range(300):
        damaged = good.clone()
        damaged[seed % 40 if seed % 2 else seed * 16] ^= 1 + seed % 255
        with contextlib.suppress(RuntimeError):
            put_random_state(from_tensors({**to_tensors(take_random_state()), "torch": damaged}))
        torch.rand(700)


def test_other_generator_of_numpy_is_refused():
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(ConfigError, match="Mersenne twister"):
            take_random_state()
    finally:
        np.random.set_bit_generator(original)


def test_block_leaves_no_trace_even_if_it_raises():
    seed_generators(5)
    expected = _draw()
    seed_generators(5)
    with contextlib.suppress(KeyError), random_state_kept():
        seed_generators(9)
        _draw()
        raise KeyError
    assert _draw() == expected


def test_seeding_leaves_cuda_alone(monkeypatch):
    """torch.manual_seed seeds CUDA as well, whose state nobody puts back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(1)
    assert seeded == [1]
    seed_generators(2)
    assert seeded == [1]


def test_seeds_stay_what_they_are():
    """Another hash would give resumed trainings other augmentations than they began with."""
    assert mix_seed(1, 2, 3) == 13041116711478803063
    assert mix_seed(0) == 1786884285633530058
    assert (
        len({mix_seed(seed, rank, 0, place) for seed in range(5) for rank in range(5) for place in range(40)}) == 1000
    )
