"""ShuffleMamba restated in float64 from the facts, under upstream's names: token by token, nothing shared with ours.

Source: arXiv 2408.17081 and the fact sheet ``../shared/zoo/shufflemamba.md``; the original code has no licence and
nothing here is from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]


def scan(u: Tensor, delta: Tensor, decay: Tensor, b_in: Tensor, c_out: Tensor, skip: Tensor) -> Tensor:
    """The recurrence of one direction: u, delta (b, l, e), decay (e, n), b_in, c_out (b, l, n), skip (e)."""
    h = u.new_zeros(u.shape[0], u.shape[2], decay.shape[1])
    ys = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * decay) * h + step * b_in[:, t, None] * u[:, t, :, None]
        ys.append((h * c_out[:, t, None]).sum(-1) + skip * u[:, t])
    return torch.stack(ys, 1)


def direction(state: State, name: str, suffix: str, xz: Tensor) -> Tensor:
    """One direction of the mixer of xz (b, l, 2e), gated: (b, l, e)."""
    x, z = xz.chunk(2, -1)
    weight = state[f"{name}.conv1d{suffix}.weight"]  # (e, 1, k)
    x = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    x = F.silu(F.conv1d(x, weight, state[f"{name}.conv1d{suffix}.bias"], groups=len(weight))).transpose(1, 2)
    a_log = state[f"{name}.A{suffix}_log"]
    n, rank = a_log.shape[1], state[f"{name}.dt_proj{suffix}.weight"].shape[1]
    dt, b_in, c_out = (x @ state[f"{name}.x_proj{suffix}.weight"].T).split([rank, n, n], -1)
    step = dt @ state[f"{name}.dt_proj{suffix}.weight"].T + state[f"{name}.dt_proj{suffix}.bias"]
    y = scan(x, torch.log1p(torch.exp(step)), -torch.exp(a_log), b_in, c_out, state[f"{name}.D{suffix}"])
    return y * F.silu(z)


def mixer(state: State, name: str, x: Tensor) -> Tensor:
    """Both directions of x (b, l, d), halved and projected: (b, l, d)."""
    xz = x @ state[f"{name}.in_proj.weight"].T
    both = direction(state, name, "", xz) + direction(state, name, "_b", xz.flip(1)).flip(1)
    return both / 2 @ state[f"{name}.out_proj.weight"].T


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """RMSNorm where the state has no bias, else a layer norm."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    return x if bias is None else x + bias


def walk(
    state: State, tokens: Tensor, permutations: Sequence[Sequence[int] | None] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Run all layers on tokens (b, l, d): the mixer's output of each, and the normed sum at the end."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    h, r = tokens, torch.zeros_like(tokens)
    hidden = []
    for i in range(depth):
        permutation = None if permutations is None else permutations[i]
        if permutation is not None:
            h, r = h[:, permutation], r[:, permutation]
        r = r + h
        h = mixer(state, f"layers.{i}.mixer", norm(state, f"layers.{i}.norm", r))
        if permutation is not None:
            back = [list(permutation).index(t) for t in range(len(permutation))]
            h, r = h[:, back], r[:, back]
        hidden.append(h)
    return hidden, norm(state, "norm_f", r + h)


def patches(state: State, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Embed an image; tokens (b, l, d) row by row and the grid."""
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(image, weight, state["patch_embed.proj.bias"], stride=weight.shape[2:])
    return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def position(rows: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resize the rows (1, l, d) of a position embedding of grid ``own``."""
    if own == grid:
        return rows
    as_map = rows.transpose(1, 2).unflatten(2, own)
    return F.interpolate(as_map, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def classify(state: State, image: Tensor, own: tuple[int, int], permutations=None) -> Tensor:
    """The plain classifier, its class token first; ``own`` is the grid of its position embedding."""
    x, grid = patches(state, image)
    embedding = state["pos_embed"]
    x = x + position(embedding[:, 1:], own, grid)
    first = (state["cls_token"] + embedding[:, :1]).expand(len(x), -1, -1)
    _, out = walk(state, torch.cat([first, x], 1), permutations)
    return out[:, 0] @ state["head.weight"].T + state["head.bias"]


def spread(x: Tensor, registers: Tensor) -> tuple[Tensor, list[int]]:
    """Put registers (1, k, d) into tokens (b, l, d), one behind each of k groups; the sequence and their places."""
    k = registers.shape[1]
    size = x.shape[1] // (k + 1)
    sequence: list[Tensor] = []
    places = []
    for i in range(k):
        sequence += [x[:, i * size + j] for j in range(size)]
        places.append(len(sequence))
        sequence.append(registers[:, i].expand(len(x), -1))
    sequence += [x[:, j] for j in range(k * size, x.shape[1])]
    return torch.stack(sequence, 1), places


def classify_registers(state: State, image: Tensor, own: tuple[int, int], permutations=None) -> Tensor:
    """The -Reg classifier."""
    x, grid = patches(state, image)
    x = x + position(state["pos_embed"], own, grid)
    sequence, places = spread(x, state["cls_token"] + state["pos_embed_cls"])
    _, out = walk(state, sequence, permutations)
    out = out[:, places]
    if "neck.weight" in state:
        out = norm(state, "norm_neck", (out @ state["neck.weight"].T).flatten(1))
    return out.flatten(1) @ state["head.weight"].T + state["head.bias"]


def features(state: State, image: Tensor, own: tuple[int, int], out_indices: Sequence[int]) -> list[Tensor]:
    """The maps (b, d, h, w) of the segmentation backbone."""
    x, grid = patches(state, image)
    hidden, last = walk(state, x + position(state["pos_embed"], own, grid))
    hidden[-1] = last
    return [hidden[i].transpose(1, 2).unflatten(2, grid) for i in out_indices]
