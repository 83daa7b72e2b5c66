"""Rules over our own sources, by their syntax trees (F1): what could run foreign code, or hide that something failed.

A rule is broken only where ``EXCUSED`` says why; an excuse that nothing needs any more fails too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("mmvmamba", "tools", "demo", "scripts", "benchmarks", "configs", "setup.py")
TESTS = ("tests",)

_READERS = ("torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url")
_UNPICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle")
_YAML = (
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
)
_RUNNERS = ("eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module", "code.interact")
_SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn")

#: Rule -> file -> why it may be broken there.
EXCUSED: dict[str, dict[str, str]] = {
    "torch.load": {
        "mmvmamba/checkpoints/reader.py": "the one reader: weights_only=True, of a file that was checked before",
    },
    "pickle": {
        "mmvmamba/checkpoints/reader.py": "only the exception that torch.load raises",
        "tests/test_checkpoints/hostile.py": "makes the hostile files",
        "tests/test_checkpoints/test_reader.py": "makes files by hand",
        "tests/test_checkpoints/test_odd_files.py": "makes files by hand",
    },
    "weights_only": {
        "tests/test_checkpoints/test_hostile.py": "shows that the hostile files are hostile",
    },
    "running text": {
        "tests/test_readme.py": "runs the examples of the README",
        "tests/test_docs/page.py": "runs the examples of the documents, and asks modules for their --help",
        "tests/test_engine/training_server.py": "runs tools/train.py in processes that need not import PyTorch anew",
        "tests/test_tools/hostile_runs.py": "runs the tools in processes that need not import PyTorch anew",
        "tests/test_public_api.py": "imports modules by name",
        "tests/test_checkpoints/hostile.py": "imports what hostile files call",
    },
    "shell": {
        "tests/test_checkpoints/hostile.py": "a hostile file names os.system",
    },
    "assert": {
        "mmvmamba/models/backbones/vmamba.py": "tells mypy which of two types it is; no input decides it",
    },
}


def _files(*roots: str) -> Iterator[Path]:
    for root in roots:
        path = ROOT / root
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def _dotted(node: ast.AST) -> str:
    """Return the name of what is called or read, such as ``torch.load``, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _full_names(tree: ast.AST) -> dict[str, str]:
    """Return what imported names stand for: ``from torch import load as l`` gives ``{"l": "torch.load"}``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def broken_rules(source: str) -> Iterator[tuple[str, int]]:
    """Yield the rules that a source breaks, with the lines."""
    tree = ast.parse(source)
    full = _full_names(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Name, ast.Attribute)):
            head, _, rest = _dotted(node).partition(".")
            name = ".".join(filter(None, (full.get(head, head), rest)))
            name = {"builtins." + runner: runner for runner in _RUNNERS}.get(name, name)
            for rule, names in {
                "torch.load": _READERS,
                "yaml": _YAML,
                "naming what runs text": _RUNNERS,
                "shell": _SHELLS,
            }.items():
                if name in names or (rule == "torch.load" and name == "torch.serialization.load"):
                    yield rule, line
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(module.split(".")[0] in _UNPICKLERS for module in modules):
                yield "pickle", line
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield "bare except", line
        elif isinstance(node, ast.Assert):
            yield "assert", line
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "strict" and _is(keyword.value, False) and _dotted(node.func) != "zip":
                    yield "strict", line
                elif keyword.arg == "shell" and not _is(keyword.value, False):
                    yield "shell", line
                elif keyword.arg == "allow_pickle" and not _is(keyword.value, False):
                    yield "pickle", line
                elif keyword.arg == "weights_only" and not _is(keyword.value, True):
                    yield "weights_only", line
            if full.get(_dotted(node.func), _dotted(node.func)).removeprefix("builtins.") in _RUNNERS:
                yield "running text", line
            if _dotted(node.func).endswith(".load_state_dict") and any(_is(argument, False) for argument in node.args):
                yield "strict", line


@functools.cache
def _broken_in(path: Path) -> list[tuple[str, int]]:
    return list(broken_rules(path.read_text()))


def _found(roots: tuple[str, ...], without: tuple[str, ...] = ()) -> list[tuple[str, str, int]]:
    return [
        (rule, path.relative_to(ROOT).as_posix(), line)
        for path in _files(*roots)
        for rule, line in _broken_in(path)
        if rule not in without
    ]


def _excused(rule: str, path: str) -> bool:
    return path in EXCUSED.get(rule, {})


def test_own_sources():
    # Asserts of the package might be meant for inputs; those of scripts and benchmarks help the type checker.
    found = [
        *_found(("mmvmamba", "tools", "demo", "configs")),
        *_found(("scripts", "benchmarks", "setup.py"), without=("assert",)),
    ]
    assert [each for each in found if not _excused(*each[:2])] == []


def test_tests():
    """They assert, load parts of models, read back what they saved and write hostile files that name eval."""
    found = _found(TESTS, without=("assert", "torch.load", "strict", "naming what runs text"))
    assert [each for each in found if not _excused(*each[:2])] == []


def test_no_excuse_is_left_over():
    found = {(rule, path) for rule, path, _ in _found((*OWN, *TESTS))}
    assert {(rule, path) for rule, paths in EXCUSED.items() for path in paths} <= found
    assert all(len(reason) > 10 for paths in EXCUSED.values() for reason in paths.values())


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("from torch import load as read\nread('x')", "torch.load"),
        ("from torch.serialization import load\nload('x')", "torch.load"),
        ("import torch\nread = torch.load", "torch.load"),
        ("import torch\ntorch.hub.load('a', 'b')", "torch.load"),
        ("f(weights_only=False)", "weights_only"),
        ("f(weights_only=flag)", "weights_only"),
        ("import pickle", "pickle"),
        ("import pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import numpy\nnumpy.load('x', allow_pickle=True)", "pickle"),
        ("import yaml\nyaml.load('x')", "yaml"),
        ("from yaml import full_load\nfull_load('x')", "yaml"),
        ("eval('1')", "running text"),
        ("exec('1')", "running text"),
        ("import builtins\nbuiltins.eval('1')", "running text"),
        ("list(map(eval, []))", "naming what runs text"),
        ("from builtins import exec as run\nrun('1')", "running text"),
        ("__import__('os')", "running text"),
        ("import os\nos.system('x')", "shell"),
        ("from os import system\nsystem('x')", "shell"),
        ("run('x', shell=True)", "shell"),
        ("run('x', shell=flag)", "shell"),
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("model.load_state_dict(state, strict=False)", "strict"),
        ("model.load_state_dict(state, False)", "strict"),
        ("assert x > 0", "assert"),
    ],
)
def test_the_rules_see_what_they_are_for(source, rule):
    assert rule in [found for found, _ in broken_rules(source)]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "zip(a, b, strict=False)",
        "import torch\ntorch.save(x, 'y')",
        "import yaml\nyaml.safe_load('x')",
        "import json\njson.load(file)",
        "run(['x'], shell=False)",
        "try:\n    f()\nexcept OSError:\n    pass",
        "'''torch.load(x, weights_only=False), strict=False'''",
    ],
)
def test_the_rules_leave_the_rest_alone(source):
    assert list(broken_rules(source)) == []
