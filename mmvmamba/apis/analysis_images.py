"""Images for analysis tools: any files and folders, by default scenes of the digits data set, made if absent."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmvmamba.analysis.predictions import pictures
from mmvmamba.apis.demo import QUICK_DATA
from mmvmamba.datasets import write_digits
from mmvmamba.optional import optional_package

DEFAULT_DATA = Path("data/digits-quick")
"""What ``make demo QUICK=1`` makes, too."""


def add_image_arguments(parser: argparse.ArgumentParser, *, shape: tuple[int, int], limit: int | None) -> None:
    """Add ``--images``, ``--shape`` and, where a tool takes several images, ``--limit``.

    Args:
        parser: The command line.
        shape: Default height and width.
        limit: Default number of images; None for a tool that takes one.
    """
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help=f"image files and folders of images (default: scenes of digits, made in {DEFAULT_DATA})"
        + ("" if limit is not None else "; the first one is taken"),
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        default=list(shape),
        metavar=("HEIGHT", "WIDTH"),
        help=f"size that every image is resized to (default: {shape[0]} {shape[1]})",
    )
    if limit is not None:
        parser.add_argument("--limit", type=_number, default=limit, help=f"take the first so many images ({limit})")


def _number(text: str) -> int:
    """Read a number of images: Python would take a negative one for all but the last ones."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} images, expected at least 1")
    return number


def image_paths(given: list[str] | None) -> list[str]:
    """Return the files and folders that a command line names, checked; the default is made if it is absent.

    Raises:
        DataError: If one does not exist, or a folder has no image.
        MissingPackage: If the default is asked for and scikit-learn, whose digits it is made of, is not installed.
    """
    if given is None:
        if not (DEFAULT_DATA / "manifest.json").is_file():
            optional_package("sklearn", "analysis")
        write_digits(DEFAULT_DATA, QUICK_DATA)
        return [str(DEFAULT_DATA / "images" / "train")]
    pictures(given)
    return given
