"""Every case of tests/data/parity through the converters: what upstream computes is what we compute.

The folder is the list of tests: a new family adds its data and a converter, nothing here. Tolerances are those of
tests/data/parity/README.md.
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.converters.base import load_converter
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.ops import use_backend
from mmvmamba.testing import relative_error, requires_extension

DATA = Path(__file__).parents[1] / "data" / "parity"
CASES = sorted(DATA.glob("*/*.npz"))
KEY_LISTS = sorted(DATA.glob("*/*.keys.json.gz"))
#: family -> bounds of outputs and input gradient, relative to the largest value.
BOUNDS = {"vmamba": (3e-5, 3e-4)}
OTHER_BOUNDS = (1e-4, 1e-3)
GRAD_NORM_BOUND = 1e-3
#: family -> parameters whose true gradient is zero by the fact sheet: what upstream recorded is rounding noise.
WITHOUT_GRADIENT = {"efficientvim": r".*mixer\.A"}


def _name(path):
    return f"{path.parent.name}-{path.name.split('.')[0]}"


def _tensor(array):
    value = torch.from_numpy(array)
    return value.float() if value.dtype == torch.float16 else value


def _flatten(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [leaf for value in values for leaf in _flatten(value)]


def _needs(meta):
    if "classifier" in meta["form"]:
        pytest.importorskip("mmpretrain", reason="classifiers are MMPretrain models")


@pytest.fixture(params=["reference", pytest.param("compiled", marks=requires_extension())])
def backend(request):
    """Run the test with each backend of the operators."""
    with use_backend(request.param):
        yield request.param


def test_a_nan_is_an_error():
    """What the bounds below rely on."""
    nan = torch.tensor([1.0, float("nan")])
    assert not relative_error(nan, torch.ones(2)) <= 1.0
    assert not relative_error(torch.ones(2), nan) <= 1.0


def test_data_is_there():
    """An empty folder would make every test below pass."""
    for paths in (CASES, KEY_LISTS):
        assert {path.parent.name for path in paths} == set(FAMILIES)
    assert len(CASES) >= 6
    assert len(KEY_LISTS) >= 9


def _taken(meta, state):
    """Return the entries that the form takes: a feature extractor of ours has no head, where upstream has but one."""
    head = load_converter(meta["family"]).head
    if "classifier" in meta["form"]:
        return state
    return {name: value for name, value in state.items() if not re.fullmatch(head, name)}


@pytest.mark.parametrize("path", CASES, ids=_name)
def test_case(path, backend):
    """Outputs, input gradient and the norm of every parameter gradient agree with upstream's."""
    meta = json.loads(path.with_suffix(".json").read_text())
    _needs(meta)
    data = np.load(path)
    family, form = meta["family"], meta["form"]
    state = {key[3:]: _tensor(data[key]) for key in data.files if key.startswith("sd:")}
    # A recorded training pass has its permutations in the arguments.
    model = from_upstream(family, form, meta["kwargs"]).train("permutations" in meta["kwargs"])
    converted = convert_state_dict(family, form, state)
    model.load_state_dict(converted, strict=True)
    left_out = sum(state[name].numel() for name in set(state) - set(_taken(meta, state)))
    assert sum(p.numel() for p in model.parameters()) + left_out == meta["num_params"]

    image = _tensor(data["x"]).requires_grad_()
    outs = _flatten(model(image))
    sum(out.float().pow(2).mean() for out in outs).backward()
    bound_out, bound_grad = BOUNDS.get(family, OTHER_BOUNDS)
    # Not max(errors) <= bound: max may pass over a NaN, all does not.
    errors = [relative_error(out.detach(), _tensor(data[f"out{i}"])) for i, out in enumerate(outs)]
    assert len(outs) == len(meta["outputs"])
    assert all(error <= bound_out for error in errors), errors
    error_grad = relative_error(image.grad, _tensor(data["grad_x"]))
    assert error_grad <= bound_grad

    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: float(grad.norm()) for name, grad in to_upstream_state_dict(family, form, grads).items()}
    noise = WITHOUT_GRADIENT.get(family, "(?!)")
    expected = {name: want for name, want in meta["grad_norms"].items() if not re.fullmatch(noise, name)}
    assert {name for name in norms if not re.fullmatch(noise, name)} == set(expected)
    # Some are zero exactly: the first token of a scan does not depend on A.
    error_norms = {
        name: abs(norms[name] - want) / (want or 1e-30) for name, want in expected.items() if want or norms[name]
    }
    wrong = {name: error for name, error in error_norms.items() if not error <= GRAD_NORM_BOUND}
    assert not wrong
    worst = max(error_norms.values())
    print(f"{_name(path)} {backend}: out {max(errors):.1e}, grad_x {error_grad:.1e}, grad norms {worst:.1e}")


@pytest.mark.parametrize("path", CASES, ids=_name)
def test_round_trip_is_bitwise(path):
    """Upstream's state dict comes back unchanged: every key used once, every bit kept."""
    meta = json.loads(path.with_suffix(".json").read_text())
    data = np.load(path)
    state = {key[3:]: _tensor(data[key]) for key in data.files if key.startswith("sd:")}
    back = to_upstream_state_dict(meta["family"], meta["form"], convert_state_dict(meta["family"], meta["form"], state))
    taken = _taken(meta, state)
    assert set(back) == set(taken)
    assert all(torch.equal(back[key], taken[key]) for key in taken)


@pytest.mark.parametrize("path", KEY_LISTS, ids=_name)
def test_key_list(path):
    """Every official model has exactly the names, shapes and number of parameters that ours converts to."""
    meta = json.loads(gzip.decompress(path.read_bytes()))
    _needs(meta)
    family, form = meta["family"], meta["form"]
    with torch.device("meta"):
        model = from_upstream(family, form, meta["kwargs"])
        upstream = {
            key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in meta["keys"].items()
        }
    model.load_state_dict(convert_state_dict(family, form, upstream), strict=True, assign=True)
    back = to_upstream_state_dict(family, form, model.state_dict())
    entries = [(key, [list(value.shape), str(value.dtype).removeprefix("torch.")]) for key, value in back.items()]
    assert entries == list(meta["keys"].items())  # as lists: the order is upstream's too
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
