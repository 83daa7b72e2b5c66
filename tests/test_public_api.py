"""Exported names, lookup by scope from the OpenMMLab packages, and the direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmvmamba"

#: Part of the package -> the parts it may import (top-level modules without a part are free for all).
LAYERS = {
    "ops": set(),
    "checkpoints": set(),
    "models": {"ops", "checkpoints"},
    "converters": {"ops", "checkpoints", "models"},
    "engine": {"ops", "checkpoints", "models", "converters"},
    "datasets": {"ops", "models"},
    "analysis": {"ops", "models"},
    "deployment": {"ops", "models"},
    "apis": {"ops", "checkpoints", "models", "engine", "converters", "datasets", "analysis", "deployment"},
}
#: Part -> third-party packages it may import at module level.
THIRD_PARTY = {
    "ops": {"torch"},
    "models": {"torch", "mmengine"},
    "checkpoints": {"torch", "safetensors"},
    "engine": {"torch", "mmengine", "numpy"},
    "converters": {"torch"},
    "datasets": {"numpy", "cv2", "PIL"},
    "analysis": {"torch", "numpy", "cv2", "mmengine", "matplotlib"},
    "deployment": {"torch", "numpy"},
    "apis": {"torch", "mmengine"},
}


def _python(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["mmvmamba", "mmvmamba.ops", "mmvmamba.models", "mmvmamba.converters"])
def test_exported_names_exist(module):
    loaded = __import__(module, fromlist=["__all__"])
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_version_is_the_package_s():
    import mmvmamba
    from mmvmamba.version import __version__

    assert mmvmamba.__version__ == __version__


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmpretrain"])
def test_scope_prefix_needs_no_custom_imports(scope):
    """In a fresh process, the other package's own registry builds our class by its prefixed name alone."""
    pytest.importorskip(scope)
    result = _python(
        f"from {scope}.registry import MODELS; import sys\n"
        "assert not any(name.startswith('mmvmamba') for name in sys.modules)\n"
        "print(type(MODELS.build(dict(type='mmvmamba.VMamba', arch='nano'))).__module__)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "mmvmamba.models.backbones.vmamba"


def test_hooks_are_found_by_prefix():
    """In a fresh process, as MMEngine's runner looks them up."""
    pytest.importorskip("mmengine")
    result = _python(
        "from mmengine.registry import HOOKS; import sys\n"
        "assert not any(name.startswith('mmvmamba') for name in sys.modules)\n"
        "print(type(HOOKS.build(dict(type='mmvmamba.PretrainedCheckHook'))).__module__)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "mmvmamba.engine.hooks.pretrained_check_hook"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mmvmamba", ("mmengine", "mmcv", "mmdet")),
        ("mmvmamba.ops", ("mmengine", "mmcv", "mmdet")),
        ("mmvmamba.models", ("mmcv", "mmdet", "mmseg", "mmpretrain")),
        ("mmvmamba.converters", ("mmcv", "mmdet", "mmseg", "mmpretrain")),
    ],
)
def test_only_what_is_needed_is_imported(module, absent):
    result = _python(f"import {module}, sys\nprint([n for n in {absent!r} if n in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def _module_imports(path):
    """Yield the names of modules imported outside functions (imports for type checking included)."""
    for node in ast.parse(path.read_text()).body:
        nodes = ast.walk(node) if isinstance(node, (ast.If, ast.Try)) else [node]
        for child in nodes:
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module


def test_every_part_has_a_rule():
    """The rule of CONTRIBUTING.md names each part, and so does this file."""
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert parts == set(LAYERS) == set(THIRD_PARTY)
    rule = (ROOT / "CONTRIBUTING.md").read_text().split("**Imports go one way:**")[1].split("\n\n")[0]
    assert all(f"`{part}`" in rule for part in parts)


@pytest.mark.parametrize("part", LAYERS)
def test_imports_go_one_way(part):
    parts = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    for path in sorted((PACKAGE / part).rglob("*.py")):
        for name in _module_imports(path):
            words = name.split(".")
            if words[0] == "mmvmamba":
                target = words[1] if len(words) > 1 and words[1] in parts else part
                assert target == part or target in LAYERS[part], f"{path.relative_to(ROOT)} imports {name}"
            elif words[0] == "triton" and path.name.startswith("triton_"):
                pass  # the kernels themselves, imported when the first of them runs: see below
            elif words[0] not in sys.stdlib_module_names:
                assert words[0] in THIRD_PARTY[part], f"{path.relative_to(ROOT)} imports {name}"


def test_triton_is_imported_only_by_its_kernels():
    """It takes a second, and need not be there at all."""
    code = "import sys, mmvmamba, mmvmamba.ops; mmvmamba.ops.available_backends(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_in_the_package_imports_the_tools():
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] in ("tools", "tests", "configs") for name in _module_imports(path)), path
