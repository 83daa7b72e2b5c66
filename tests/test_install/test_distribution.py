"""What the source distribution and the wheel hold (the wheel without its extension, which takes long to compile)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def archives(root, tmp_path_factory) -> tuple[set[str], set[str]]:
    """Names in the sdist (without its leading folder) and in the wheel, built from a copy of the tracked files."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("output")
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "NOTICE", "README.md", "mmvmamba", "csrc"]
    for name in [*names, "tests/test_install", "scripts", "requirements"]:
        place = root / name
        if place.is_dir():
            shutil.copytree(place, source / name)
        else:
            shutil.copy(place, source / name)
    # A stale binary in the tree must not reach an archive.
    (source / "mmvmamba" / "_C.abi3.so").write_text("stale")
    (source / "mmvmamba" / "_C.json").write_text("{}")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(output), "bdist_wheel", "-d", str(output)],
        cwd=source,
        env={**os.environ, "MMVMAMBA_BUILD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    with tarfile.open(next(output.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    with zipfile.ZipFile(next(output.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    return in_sdist, in_wheel


def test_the_wheel_is_the_package_and_nothing_else(archives, root):
    _, in_wheel = archives
    package = {
        path.relative_to(root).as_posix()
        for path in (root / "mmvmamba").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in in_wheel if ".dist-info/" not in name} == package
    licences = {Path(name).name for name in in_wheel if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_sdist_can_be_built_and_tested(archives, root):
    in_sdist, _ = archives
    sources = {path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.is_file()}
    assert sources <= in_sdist
    assert {"setup.py", "pyproject.toml", "mmvmamba/version.py", "requirements/lock.txt"} <= in_sdist
    assert "tests/test_install/test_distribution.py" in in_sdist


def test_no_binary_reaches_an_archive(archives):
    for names in archives:
        assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc", "_C.json"))]


def test_the_check_of_the_wheel_leaves_out_what_needs_the_source_tree(root):
    """It copies tests/*.py and tests/test_ops away; what reaches further would fail there."""
    script = (root / "scripts" / "check_wheel.sh").read_text()
    left_out = set(re.search(r'needs_source_tree="(.*)"', script)[1].split())
    reaching = re.compile(r"parents\[[2-9]\]|cuda_emulation|\bconfigs/")
    found = {path.name for path in (root / "tests" / "test_ops").glob("test_*.py") if reaching.search(path.read_text())}
    assert found == left_out
