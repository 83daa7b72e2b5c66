"""Put configs, tools and the list of models into the package, where ``mim`` and MMEngine look for them.

A part of setup.py. ``mmvmamba/.mim`` holds copies in a wheel and links in a checkout that is installed as it stands
(``pip install -e .``); a checkout works without them, but for ``_base_ = "mmvmamba::..."`` in configs elsewhere.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("configs", "tools", "demo", "model-index.yml")
SUFFIXES = (".py", ".yml", ".md", ".sh", ".png", ".jpg")


def mim_files(root: Path) -> list[Path]:
    """The files of ``PARTS``, relative to ``root``, sorted."""
    found = [path for part in PARTS for path in (root / part, *(root / part).rglob("*"))]
    return sorted(path.relative_to(root) for path in found if path.is_file() and path.suffix in SUFFIXES)


def copy_mim(root: Path, target: Path) -> None:
    """Copy ``mim_files`` to a new folder ``target``."""
    shutil.rmtree(target, ignore_errors=True)  # of an earlier build, perhaps with files that are gone
    for name in mim_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
        shutil.copymode(root / name, target / name)


def link_mim(root: Path, target: Path) -> None:
    """Make ``target`` a folder of links to ``PARTS``."""
    target.mkdir(exist_ok=True)
    for part in PARTS:
        link = target / part
        if link.is_symlink():
            link.unlink()
        if (root / part).exists() and not link.exists():
            link.symlink_to(os.path.relpath(root / part, target))


class BuildWithConfigs(build_py):
    """A ``build_py`` that adds ``mmvmamba/.mim``."""

    def run(self) -> None:
        """Build the package, then add the folder."""
        super().run()
        if not self.editable_mode:
            copy_mim(ROOT, Path(self.build_lib) / "mmvmamba" / ".mim")
            return
        try:
            link_mim(ROOT, ROOT / "mmvmamba" / ".mim")
        except OSError as error:  # Windows allows links to few
            print(f"mmvmamba: no links in mmvmamba/.mim ({error}): install a wheel to use mmvmamba:: bases")


class WheelWithConfigs(bdist_wheel):
    """A ``bdist_wheel`` with a second copy among the metadata, for onedl-mim.

    That one (0.5.1) takes the folder of the first line of RECORD for the package. pip sorts the lines, and
    ``mmvmamba-<version>.dist-info`` comes before ``mmvmamba/``.
    """

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        """Write the metadata, then add the folder."""
        super().egg2dist(egginfo_path, distinfo_path)
        copy_mim(ROOT, Path(distinfo_path) / ".mim")


COMMANDS: dict[str, type] = {"build_py": BuildWithConfigs, "bdist_wheel": WheelWithConfigs}
