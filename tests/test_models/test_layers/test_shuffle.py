"""Stochastic layer-wise shuffle, alone and in every columnar backbone."""

import pytest
import torch

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.backbones.columnar import ColumnarBackbone
from mmvmamba.models.layers.shuffle import GivenShuffle, LayerShuffle, in_order

COLUMNAR = [cls for cls in FAMILIES.values() if issubclass(cls, ColumnarBackbone)]
every_columnar = pytest.mark.parametrize("backbone", COLUMNAR, ids=lambda cls: cls.__name__)


def test_the_probabilities_rise_linearly_from_none():
    assert LayerShuffle(0.5, 24).rates == pytest.approx(torch.linspace(0, 0.5, 24, dtype=torch.float64).tolist())
    assert LayerShuffle(0.5, 1).rates == (0.0,)
    assert LayerShuffle(1.0, 3).rates == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("u", [0.0, 0.2499999, 0.25, 0.9])
def test_a_layer_is_shuffled_where_the_number_is_below_its_probability(u, monkeypatch):
    shuffle = LayerShuffle(0.5, 3).train()
    monkeypatch.setattr(torch, "rand", lambda *_args, **_options: torch.tensor([u], dtype=torch.float64))
    tokens = torch.zeros(2, 9, 1)
    drawn = [shuffle.draw(layer, tokens) is not None for layer in range(3)]
    assert drawn == [False, u < 0.25, u < 0.5]


def test_how_often():
    torch.manual_seed(0)
    shuffle, tokens = LayerShuffle(0.6, 4).train(), torch.zeros(1, 3, 1)
    rounds = 2000
    counts = [sum(shuffle.draw(layer, tokens) is not None for _ in range(rounds)) for layer in range(4)]
    assert counts[0] == 0
    for count, p in zip(counts[1:], (0.2, 0.4, 0.6), strict=True):
        assert abs(count / rounds - p) < 5 * (p * (1 - p) / rounds) ** 0.5


def test_every_order_of_tokens_is_as_probable():
    torch.manual_seed(1)
    shuffle, tokens = LayerShuffle(1.0, 2).train(), torch.zeros(1, 3, 1)
    seen = [tuple(shuffle.draw(1, tokens).tolist()) for _ in range(1200)]
    assert {seen.count(order) > 130 for order in set(seen)} == {True} and len(set(seen)) == 6


def test_nothing_is_drawn_in_evaluation_and_at_rate_zero():
    before = torch.get_rng_state()
    assert LayerShuffle(1.0, 2).eval().draw(1, torch.zeros(1, 5, 1)) is None
    assert LayerShuffle(0.0, 2).train().draw(1, torch.zeros(1, 5, 1)) is None
    assert torch.equal(before, torch.get_rng_state())


def test_tokens_come_back_to_their_places():
    x, permutation = torch.randn(2, 5, 3), torch.tensor([3, 0, 4, 1, 2])
    seen = []
    out = in_order(lambda tokens: seen.append(tokens) or 2 * tokens, x, permutation)
    assert torch.equal(seen[0], x[:, permutation]) and torch.equal(out, 2 * x)
    assert in_order(lambda tokens: tokens, x, None) is x


@pytest.mark.parametrize("rate", [-0.1, 1.1, True, None, "0.5"])
def test_bad_rates(rate):
    with pytest.raises(ConfigError, match=r"shuffle_rate is .*expected a number in \[0, 1\]"):
        LayerShuffle(rate, 2)


def test_given_permutations():
    shuffle = GivenShuffle([None, [1, 0, 2]])
    tokens = torch.zeros(1, 3, 1)
    assert shuffle.train().draw(0, tokens) is None and shuffle.draw(1, tokens).tolist() == [1, 0, 2]
    assert shuffle.eval().draw(1, tokens) is None and not shuffle.state_dict()
    assert shuffle.double().train().draw(1, tokens).dtype == torch.int64
    with pytest.raises(ConfigError, match=r"permutations\[1\] is of 3 tokens, expected 4"):
        shuffle.draw(1, torch.zeros(1, 4, 1))
    with pytest.raises(ConfigError, match=r"permutations\[0\] is \[0, 0\], expected every number from 0 to 1 once"):
        GivenShuffle([[0, 0]])


# ---------------------------------------------------------------- in the backbones


def _pass(model, image, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    x = image.clone().requires_grad_()
    outs = model(x)
    sum(out.square().mean() for out in outs).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [out.detach() for out in outs], x.grad, grads


@every_columnar
def test_a_training_step_is_repeated_by_its_seed_and_by_recomputation(backbone):
    """Also with stochastic depth, whose numbers come from the same generator."""
    torch.manual_seed(0)
    model = backbone("nano", shuffle_rate=0.9, drop_path_rate=0.3, norm_eval=True).train()
    image = torch.randn(3, 3, 48, 64)
    outs, grad, grads = _pass(model, image, 7)
    again, grad_again, grads_again = _pass(model, image, 7)
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True)) and torch.equal(grad, grad_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    model.with_cp = True
    recomputed, grad_cp, grads_cp = _pass(model, image, 7)
    assert all(torch.equal(a, b) for a, b in zip(outs, recomputed, strict=True))
    assert torch.allclose(grad, grad_cp, rtol=1e-4, atol=1e-7) and grads.keys() == grads_cp.keys()
    for name, value in grads.items():
        assert torch.allclose(value, grads_cp[name], rtol=1e-4, atol=1e-6 * float(value.abs().max() + 1e-9)), name
    others = [_pass(model, image, seed)[0][-1] for seed in range(4)]
    assert not all(torch.equal(outs[-1], other) for other in others)


@every_columnar
def test_evaluation_knows_no_shuffle(backbone):
    torch.manual_seed(0)
    shuffled = backbone("nano", shuffle_rate=1.0).eval()
    ordered = backbone("nano").eval()
    ordered.load_state_dict(shuffled.state_dict())
    image = torch.randn(2, 3, 40, 56)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(shuffled(image), ordered(image), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert backbone("nano").shuffle.rate == 0.0  # an option that is off where nobody asks for it


@every_columnar
def test_all_samples_of_a_batch_share_a_permutation(backbone):
    torch.manual_seed(0)
    model = backbone("nano", shuffle_rate=1.0, drop_path_rate=0.0, norm_eval=True).train()
    one = torch.randn(1, 3, 48, 48)
    torch.manual_seed(3)
    outs = model(one.expand(3, -1, -1, -1))
    for out in outs:
        assert torch.allclose(out[0], out[1], atol=1e-5) and torch.allclose(out[0], out[2], atol=1e-5)
