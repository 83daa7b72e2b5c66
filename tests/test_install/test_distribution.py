"""What the source distribution and the wheel hold (the wheel without its extension, which takes long to compile)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmvmamba.models.backbones import FAMILIES


@pytest.fixture(scope="module")
def output(root, tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel, built from a copy of the tracked files."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("output")
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "NOTICE", "README.md", "mmvmamba", "csrc"]
    names += ["configs", "tools", "demo", "model-index.yml"]
    for name in [*names, "tests/test_install", "scripts", "requirements"]:
        place = root / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns(".mim"))
        elif place.exists():
            shutil.copy(place, source / name)
    # What lies about in a tree and is no part of it must not reach an archive.
    (source / "configs" / "det" / "weights.pth").write_text("mine")
    (source / "tools" / "__pycache__").mkdir(exist_ok=True)
    (source / "tools" / "__pycache__" / "train.cpython-310.pyc").write_text("stale")
    (source / "mmvmamba" / ".mim" / "configs").mkdir(parents=True)
    (source / "mmvmamba" / ".mim" / "configs" / "gone.py").write_text("# stale")
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
    return output


@pytest.fixture(scope="module")
def archives(output) -> tuple[set[str], set[str]]:
    """Names in the sdist (without its leading folder) and in the wheel."""
    with tarfile.open(next(output.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    with zipfile.ZipFile(next(output.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    return in_sdist, in_wheel


def test_the_wheel_is_the_package_and_nothing_else(archives, root, mim_folder):
    _, in_wheel = archives
    package = {
        path.relative_to(root).as_posix()
        for path in (root / "mmvmamba").rglob("*")
        if (path.suffix == ".py" or path.name == "py.typed") and ".mim" not in path.parts
    }
    package |= {f"mmvmamba/.mim/{name.as_posix()}" for name in mim_folder.mim_files(root)}
    assert {name for name in in_wheel if ".dist-info/" not in name} == package
    licences = {Path(name).name for name in in_wheel if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_configs_tools_and_metafiles_reach_the_wheel(archives, root):
    _, in_wheel = archives
    wanted = [
        "model-index.yml",
        "configs/README.md",
        *(path.relative_to(root).as_posix() for path in (root / "configs").rglob("*.py")),
        *(path.relative_to(root).as_posix() for path in (root / "configs").rglob("metafile.yml")),
        *(path.relative_to(root).as_posix() for path in (root / "tools").rglob("*.py")),
    ]
    assert len(wanted) > 50
    # onedl-mim takes the metadata for the package, and must find the same there.
    (metadata,) = {name.split("/")[0] for name in in_wheel if ".dist-info/" in name}
    for folder in ("mmvmamba/.mim", f"{metadata}/.mim"):
        assert {f"{folder}/{name}" for name in wanted} <= in_wheel


_LISTING = """
import json, pathlib
from mmvmamba.apis import load_config
from mmvmamba.apis.model_index import index_root, list_models
pathlib.Path("own.py").write_text("_base_ = 'mmvmamba::det/vmamba/retinanet_vmamba-tiny-s1l8_fpn_1x_coco.py'")
models = [[entry.name, str(entry.config), entry.config.is_file()] for entry in list_models()]
print(json.dumps([str(index_root()), models, load_config("own.py").model.backbone.arch]))
"""


def test_an_unpacked_wheel_lists_its_models(output, tmp_path, root):
    """In a fresh process outside the checkout; every config is there and inherits what it inherits in the checkout."""
    pytest.importorskip("mmdet")
    shutil.unpack_archive(next(output.glob("*.whl")), tmp_path, "zip")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LISTING],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    place, models, arch = json.loads(done.stdout.splitlines()[-1])
    assert place == str(tmp_path / "mmvmamba" / ".mim")
    assert arch == "tiny-s1l8"  # of a config that inherits one of the wheel
    own = [path for family in FAMILIES for path in (root / "configs").glob(f"*/{family}/*.py")]
    assert len(models) == len(own) and all(there for *_, there in models)
    for _, config, _ in models:
        for base in re.findall(r'"(\.\./[^"]+\.py)"', Path(config).read_text()):
            assert (Path(config).parent / base).is_file(), (config, base)


def test_what_mim_reads_is_in_both_places(output, tmp_path):
    """``mim search`` reads the index, ``mim train`` finds a config by its name, ``mim run`` a tool by its own."""
    yaml = pytest.importorskip("yaml")
    shutil.unpack_archive(next(output.glob("*.whl")), tmp_path, "zip")
    places = [*tmp_path.glob("*.dist-info"), tmp_path / "mmvmamba"]
    assert len(places) == 2
    for place in places:
        mim = place / ".mim"
        models = []
        for path in yaml.safe_load((mim / "model-index.yml").read_text())["Import"]:
            models += yaml.safe_load((mim / path).read_text())["Models"]
        assert len(models) >= 41
        for model in models:
            assert (mim / model["Config"]).is_file()
            assert len(list(place.rglob(Path(model["Config"]).name))) == 1  # mim refuses what it finds twice
        assert (mim / "tools" / "train.py").is_file() and len(list((mim / "tools").rglob("get_flops.py"))) == 1


def test_launchers_reach_the_wheel_as_programs(output, root):
    """From the archive pip learns which files may be run."""
    with zipfile.ZipFile(next(output.glob("*.whl"))) as wheel:
        modes = {info.filename: info.external_attr >> 16 for info in wheel.infolist()}
    scripts = sorted((root / "tools").glob("*.sh"))
    assert len(scripts) == 7
    for script in scripts:
        runs = bool(script.stat().st_mode & 0o100)
        found = [mode for name, mode in modes.items() if name.endswith(f"/.mim/tools/{script.name}")]
        assert [bool(mode & 0o100) for mode in found] == [runs, runs], script.name


def test_a_checkout_that_is_installed_as_it_stands_gets_links(mim_folder, root, tmp_path):
    for name in ("configs", "tools"):
        (tmp_path / name).mkdir()
    (tmp_path / "model-index.yml").write_text("Import: []\n")
    package = tmp_path / "mmvmamba" / ".mim"
    package.parent.mkdir()
    for _ in range(2):  # a second installation finds the links of the first
        mim_folder.link_mim(tmp_path, package)
        assert {path.name for path in package.iterdir()} == {"configs", "tools", "model-index.yml"}  # no demo yet
        assert all(path.is_symlink() and path.resolve() == tmp_path / path.name for path in package.iterdir())
    assert not (package / "configs").readlink().is_absolute()


def test_the_sdist_can_be_built_and_tested(archives, root):
    in_sdist, _ = archives
    sources = {path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.is_file()}
    assert sources <= in_sdist
    assert {"setup.py", "pyproject.toml", "mmvmamba/version.py", "requirements/lock.txt"} <= in_sdist
    assert {"model-index.yml", "configs/det/vmamba/metafile.yml", "tools/train.py", "scripts/mim_folder.py"} <= in_sdist
    assert "tests/test_install/test_distribution.py" in in_sdist


def test_no_binary_reaches_an_archive(archives):
    for names in archives:
        assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc", "_C.json", "gone.py"))]
    assert "mmvmamba/.mim/configs/det/weights.pth" not in archives[1]


def test_the_check_of_the_wheel_leaves_out_what_needs_the_source_tree(root):
    """It copies tests/*.py and tests/test_ops away; what reaches further would fail there."""
    script = (root / "scripts" / "check_wheel.sh").read_text()
    left_out = set(re.search(r'needs_source_tree="(.*)"', script)[1].split())
    reaching = re.compile(r"parents\[[2-9]\]|cuda_emulation|\bconfigs/")
    found = {path.name for path in (root / "tests" / "test_ops").glob("test_*.py") if reaching.search(path.read_text())}
    assert found == left_out
