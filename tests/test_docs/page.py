"""Doing with a code block what its treatment says, in a folder that looks like a checkout."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from tests.nano_models import ROOT, script
from tests.test_docs.blocks import Block, commands
from tests.test_docs.treatments import By, Config, Dry, Output, Python, Run, Shown, Treatment, Write

#: What makes a tool quick: words behind its arguments. Iterations are set, so names of checkpoints stay as they are.
FEW = ["--train", "8", "--val", "4", "--train-crops", "40", "--val-crops", "20"]
QUICK_TRAINING = [
    "train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2",
    "train_dataloader.batch_size=4",
]  # fmt: skip
NO_WORKERS = [
    f"{split}_dataloader.{option}"
    for split in ("train", "val", "test")
    for option in ("num_workers=0", "persistent_workers=False")
]


@dataclass
class Folder:
    """The folder that a page's blocks run in, and what its tools printed."""

    root: Path
    printed: str = ""


def treat(block: Block, treatment: Treatment, folder: Folder) -> None:
    """Do it; an error is the block's."""
    match treatment:
        case Run():
            _provide(treatment.needs, folder)
            folder.printed = ""
            for words in commands(_replaced(block.text, treatment.replace)):
                _run(words, folder)
            for name in treatment.leaves:
                assert (folder.root / name).exists(), f"{name} was not written"
            for text in treatment.prints:
                assert text in folder.printed, f"nothing printed has {text!r}"
        case Python():
            _provide(treatment.needs, folder)
            text = _replaced(block.text, treatment.replace)
            _execute(text, block.name)
        case Write():
            target = _named_file(block)
            (folder.root / target).write_text(block.text)
        case Config():
            _read_config(block, treatment, folder)
        case Dry():
            assert treatment.reason
            for words in commands(block.text.replace("&& . .venv/bin/activate", "")):
                check_arguments(words)
        case Output():
            _compare_output(block)
        case By():
            _check_named_test(treatment.test)
        case Shown():
            assert treatment.what


def _replaced(text: str, replace: object) -> str:
    assert isinstance(replace, dict)
    for old, new in replace.items():
        text = text.replace(old, new)
    return text


def _execute(text: str, name: str) -> None:
    """Execute Python as a module of its own, which torch.compile asks for by its name."""
    module = ModuleType("example_of_the_docs")
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, name, "exec"), vars(module))  # noqa: S102
    finally:
        del sys.modules[module.__name__]


def _named_file(block: Block) -> str:
    first = block.text.splitlines()[0]
    found = re.fullmatch(r"# ([\w/.-]+\.py)", first)
    assert found, f"{block.name} begins with {first!r}, not with the name of its file"
    return found[1]


# ---------------------------------------------------------------- running


def _run(words: list[str], folder: Folder) -> None:
    """Run one command line in this process, where it is one of ours."""
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        assert name == "PYTHONPATH" and value == ".", f"{name}={value}: nobody knows what to do with it"
    assert words[0] == "python", f"{words[0]}: only lines of python can be run here"
    tool, arguments = words[1], _quick(words[1], words[2:])
    with _arguments(tool, arguments), _captured(folder):
        ended = script(tool).main()
    assert ended in (None, 0), f"{tool} {arguments} ended with {ended}"
    if tool == "tools/train.py":
        _name_checkpoint(folder, arguments)


def _quick(tool: str, arguments: list[str]) -> list[str]:
    if tool == "tools/dataset_converters/digits.py":
        return [*arguments, *FEW]
    if tool in ("tools/train.py", "tools/test.py", "tools/deployment/test_exported.py"):
        options = [*(QUICK_TRAINING if tool.endswith("train.py") else []), *NO_WORKERS]
        return [*arguments, *([] if "--cfg-options" in arguments else ["--cfg-options"]), *options]
    if tool == "tools/deployment/export.py":
        return [*arguments, "--quick"]
    if tool == "tools/analysis_tools/accuracy_scaling.py":
        return [*arguments, "--cfg-options", *NO_WORKERS]
    if tool == "demo/image_demo.py":
        return [*arguments, "--device", "cpu"]
    return arguments


def _name_checkpoint(folder: Folder, arguments: list[str]) -> None:
    """Give the checkpoint of the short training the name that the page's training would have given it."""
    work = folder.root / arguments[arguments.index("--work-dir") + 1]
    full = re.search(r"^max_iters = (\d+)", (ROOT / "configs" / _digits_config(arguments[0])).read_text(), re.M)
    assert full
    for ending in ("", ".json"):
        short = work / f"iter_2.pth{ending}"
        if short.exists():
            shutil.copy(short, work / f"iter_{full[1]}.pth{ending}")


def _digits_config(config: str) -> str:
    if "configs/" in config:
        return config.split("configs/")[1]
    return "cls/digits/vmamba-nano_digits.py"  # what the examples' own configs are based on


@contextlib.contextmanager
def _arguments(tool: str, arguments: list[str]) -> Iterator[None]:
    old = sys.argv
    sys.argv = [tool, *arguments]
    try:
        yield
    finally:
        sys.argv = old


@contextlib.contextmanager
def _captured(folder: Folder) -> Iterator[None]:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        folder.printed += text.getvalue()


# ---------------------------------------------------------------- configs


def _read_config(block: Block, treatment: Config, folder: Folder) -> None:
    from mmengine.registry import MODELS, DefaultScope

    from mmvmamba.apis import load_config

    target = folder.root / (treatment.file or _named_file(block))
    target.write_text(block.text + (treatment.nano or ""))
    cfg = load_config(str(target))
    target.write_text(block.text)
    if treatment.nano is not None:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            MODELS.build(cfg.model)


# ---------------------------------------------------------------- checking without running


def check_arguments(words: list[str]) -> None:
    """Raise unless the tool of a command line is there and takes its arguments."""
    words = [word.strip("[]") for word in words]
    while words and re.fullmatch(r"[A-Z][A-Z_0-9]*=.*", words[0]):
        words.pop(0)
    if not words:
        return
    tool, arguments = words[0], words[1:]
    if tool == "python" and arguments[0] == "-m":
        _check_module(arguments[1], arguments[2:])
    elif tool == "python":
        _check_script(arguments[0], arguments[1:])
    elif tool == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif tool == "pip":
        _check_pip(arguments)
    elif tool.startswith("tools/") and tool.endswith(".sh"):
        assert os.access(ROOT / tool, os.X_OK), f"{tool} cannot be started"
        subprocess.run(["bash", "-n", str(ROOT / tool)], check=True)
        wanted = "tools/test.py" if tool.endswith("_test.sh") else "tools/train.py"
        rest = [word for word in arguments[1:] if not word.isdigit()]
        if "slurm" not in tool:
            _check_script(wanted, [arguments[0], *rest])
    else:
        assert tool == ".", f"{tool}: nobody knows how to check it. Add it to tests/test_docs/page.py."


def _check_script(tool: str, arguments: list[str]) -> None:
    """Let the tool's own parser read the arguments."""
    assert (ROOT / tool).is_file(), f"there is no {tool}"
    module = script(tool)
    with _arguments(tool, arguments):
        try:
            module.parse_args()
        except SystemExit as error:
            raise AssertionError(f"{tool} does not take {arguments}") from error


def _check_module(name: str, arguments: list[str]) -> None:
    """Look for the options of a module in its own help."""
    assert importlib.util.find_spec(name), f"there is no module {name}"
    text = io.StringIO()
    with _arguments(name, ["--help"]), contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__")
    for word in arguments:
        assert not word.startswith("--") or word in text.getvalue(), f"python -m {name} has no {word}"


def _check_pip(arguments: list[str]) -> None:
    """Check the names of extras; the rest is pip's."""
    assert arguments[0] == "install"
    (table,) = re.findall(
        r"^\[project\.optional-dependencies\]\n(.*?)^\[",
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    extras = re.findall(r"^(\w+) = ", table, re.MULTILINE)
    for word in arguments:
        for extra in re.findall(r"^(?:\.|mmvmamba)\[(\w+)", word):
            assert extra in extras, f"there is no extra {extra}"


def _compare_output(block: Block) -> None:
    """Run the line behind ``$`` and compare what it prints with what stands there."""
    first, _, shown = block.text.partition("\n")
    (words,) = commands(first)
    assert words[:2] == ["python", "-m"]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == shown.strip()


def _check_named_test(name: str) -> None:
    file, _, function = name.partition("::")
    text = (ROOT / file).read_text()
    assert not function or f"def {function}(" in text, f"{file} has no {function}"


# ---------------------------------------------------------------- what the pages take for granted


def _provide(names: tuple[str, ...], folder: Folder) -> None:
    for name in names:
        target = folder.root / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _MAKERS[name](target)


def _picture(target: Path) -> None:
    import cv2

    shutil.copy(next((Path.cwd() / "data/digits/images/val").iterdir()), target)
    assert cv2.imread(str(target)) is not None


def _official(family: str, function: str) -> Callable[[Path], None]:
    """Return what writes a file with the names and shapes of an official classifier."""

    def write(target: Path) -> None:
        from mmvmamba.converters import from_upstream, to_upstream_state_dict

        model = from_upstream(family, "classifier", {"function": function})
        torch.save({"model": to_upstream_state_dict(family, "classifier", model.state_dict())}, target)

    return write


def _weights(target: Path) -> None:
    shutil.copy(Path.cwd() / "work_dirs/demo/det/iter_800.pth", target)


_MAKERS: dict[str, Callable[[Path], None]] = {
    "epoch_12.pth": _weights,
    "street.jpg": _picture,
    "holiday/one.jpg": _picture,
    "vssm1_tiny_0230s_ckpt_epoch_264.pth": _official("vmamba", "vmamba_tiny_s1l8"),
    "vim_t_midclstok_76p1acc.pth": _official("vim", "vim_tiny"),
}
