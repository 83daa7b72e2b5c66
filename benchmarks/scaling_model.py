"""What communication adds to a training step on several GPUs, by a model; nothing here is measured.

The model: gradients are averaged in buckets as PyTorch's DDP does, the first of 1 MiB, the others of 25. Buckets become
ready evenly over the backward pass, by their bytes, and are averaged one after the other; what is not done when the
backward pass ends is added to the step. One bucket of s bytes on g GPUs of each of m nodes:

* within a node, a ring: 2 (g - 1) / g * s bytes through each GPU's link, 2 (g - 1) messages;
* between nodes, of the g-th part that each GPU holds then, a ring again: 2 (m - 1) / m * s / g bytes through each GPU's
  share of the network, 2 (m - 1) messages.

``python -m benchmarks.scaling_model --step 450 --parameters 50`` prints a table over links and numbers of GPUs. Time of
a step on one GPU and share of the backward pass are inputs. Left out: unequal images and waiting for the slowest, data
loading, validation and saving, batch norms that are synchronised, the optimizer, other jobs in the network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1024**2
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB


@dataclass(frozen=True)
class Link:
    """A way between GPUs.

    Attributes:
        name: What it is called.
        bytes_per_second: Line rate of one direction, of each GPU or, with ``per_node``, of a node.
        latency: Seconds of a message.
        per_node: Whether the GPUs of a node share it.
    """

    name: str
    bytes_per_second: float
    latency: float
    per_node: bool = False


#: Line rates by their standards; latencies are assumed.
WITHIN = {
    "nvlink": Link("NVLink 4, 450 GB/s per GPU", 450e9, 3e-6),
    "pcie": Link("PCIe 4 x16, 32 GB/s per GPU", 32e9, 5e-6),
}
BETWEEN = {
    "infiniband": Link("InfiniBand 400 Gb/s per GPU", 50e9, 5e-6),
    "ethernet-100": Link("Ethernet 100 Gb/s per node", 12.5e9, 30e-6, per_node=True),
    "ethernet-10": Link("Ethernet 10 Gb/s per node", 1.25e9, 30e-6, per_node=True),
}


def all_reduce_seconds(size: float, gpus: int, nodes: int, within: Link, between: Link, share: float) -> float:
    """Return how long averaging ``size`` bytes over ``nodes`` x ``gpus`` takes, links at ``share`` of their rate."""
    inside = 2 * (gpus - 1) * (size / gpus / (within.bytes_per_second * share) + within.latency)
    rate = between.bytes_per_second * share / (gpus if between.per_node else 1)
    outside = 2 * (nodes - 1) * (size / gpus / nodes / rate + between.latency)
    return inside + outside


def bucket_sizes(size: float) -> list[float]:
    """Return the bytes of DDP's buckets, in the order in which they become ready."""
    sizes = [min(size, FIRST_BUCKET)]
    while (rest := size - sum(sizes)) > 0:
        sizes.append(min(rest, BUCKET))
    return sizes


@dataclass(frozen=True)
class Step:
    """A step on several GPUs, in seconds.

    Attributes:
        alone: Without communication.
        communication: All of it, overlapped or not.
        exposed: What of it the step waits for.
    """

    alone: float
    communication: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """Images per second and GPU, relative to one GPU."""
        return self.alone / (self.alone + self.exposed)


def step(
    alone: float,
    backward: float,
    gradient_bytes: float,
    gpus: int,
    nodes: int,
    within: Link,
    between: Link,
    share: float,
    accumulated: int = 1,
) -> Step:
    """Return the model's step.

    Args:
        alone: Seconds of forward and backward pass of one batch on one GPU.
        backward: The backward pass' share of it.
        gradient_bytes: Of all parameters that are trained.
        gpus: Of a node.
        nodes: How many.
        within: Between the GPUs of a node.
        between: Between nodes.
        share: Of the line rate, that is reached.
        accumulated: Batches per step of the optimizer: only the last one's backward pass communicates.
    """
    done = communication = 0.0
    ready = 0.0
    for size in bucket_sizes(gradient_bytes):
        ready += alone * backward * size / gradient_bytes
        seconds = all_reduce_seconds(size, gpus, nodes, within, between, share)
        communication += seconds
        done = max(done, ready) + seconds
    exposed = done - alone * backward
    return Step(alone * accumulated, communication, max(exposed, 0.0) if gpus * nodes > 1 else 0.0)


def _rows(args: argparse.Namespace) -> list[tuple[str, int, Step]]:
    gradients = args.parameters * 1e6 * args.bytes
    rows = []
    for name, inner, outer, nodes in (
        ("NVLink", "nvlink", "infiniband", 1),
        ("PCIe", "pcie", "infiniband", 1),
        *(("NVLink + " + BETWEEN[key].name, "nvlink", key, nodes) for key in BETWEEN for nodes in args.nodes),
    ):
        links = (WITHIN[inner], BETWEEN[outer], args.share)
        of_step = step(args.step / 1e3, args.backward, gradients, args.gpus, nodes, *links, args.accumulated)
        rows.append((name, nodes * args.gpus, of_step))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument(
        "--step", type=float, required=True, help="milliseconds of forward and backward pass on one GPU"
    )
    parser.add_argument("--parameters", type=float, required=True, help="millions of parameters that are trained")
    parser.add_argument("--bytes", type=int, default=4, help="of a gradient (DDP averages those of float32 parameters)")
    parser.add_argument("--backward", type=float, default=2 / 3, help="share of the backward pass in the step")
    parser.add_argument("--share", type=float, default=0.7, help="share of the line rate that is reached")
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8], help="numbers of nodes")
    parser.add_argument("--accumulated", type=int, default=1, help="batches per step of the optimizer")
    args = parser.parse_args(arguments)
    print(
        f"a model, not a measurement: {args.step * args.accumulated:g} ms of compute per step, backward "
        f"{args.backward:.0%} of a pass, {args.parameters * args.bytes:g} MB of gradients, links at {args.share:.0%}"
    )
    print(f"{'links':42} {'GPUs':>4} {'communication':>14} {'waited for':>11} {'efficiency':>11}")
    for name, gpus, found in _rows(args):
        print(f"{name:42} {gpus:4} {found.communication * 1e3:11.1f} ms {found.exposed * 1e3:8.1f} ms "
              f"{found.efficiency:11.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
