"""One of two processes with a part of a batch each: ``FILE FOLDER`` compares a synchronised norm with one of all."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmvmamba.models.adapters.sync_batch_norm import SynchronisedBatchNorm
from mmvmamba.models.layers import BatchNorm

PARTS = (1, 3)  # images of the processes


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(PARTS), 4, 6, 5, dtype=torch.float64, generator=generator) * 3 + 7
    weights = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
    plain, synced = BatchNorm(5).double().train(), SynchronisedBatchNorm(5).double().train()
    with torch.no_grad():
        plain.weight.normal_(generator=generator)
        plain.bias.normal_(generator=generator)
    synced.load_state_dict(plain.state_dict())
    own = slice(sum(PARTS[:rank]), sum(PARTS[: rank + 1]))
    expected_in, found_in = whole.clone().requires_grad_(), whole[own].clone().requires_grad_()
    expected, found = plain(expected_in), synced(found_in)
    (expected * weights).sum().backward()
    (found * weights[own]).sum().backward()
    torch.testing.assert_close(found, expected[own])
    torch.testing.assert_close(found_in.grad, expected_in.grad[own])
    for name in ("weight", "bias"):
        total = getattr(synced, name).grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, getattr(plain, name).grad)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(synced.get_buffer(name), value)
    plain.eval(), synced.eval()
    torch.testing.assert_close(synced(whole[own]), plain(whole)[own])
    (Path(sys.argv[1]) / f"same{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
