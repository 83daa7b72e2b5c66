"""Runs tools with hostile names, each in a fork of a process that has imported what they need: ``python FILE FOLDER``.

Prints one JSON list of [tool, arguments, exit status, last line of the errors]; a status below 0 is a signal.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Seconds that a call may take before it is ended by SIGALRM.
_LIMIT = 60


def _calls(name: str) -> list[tuple[str, list[str]]]:
    """Return what is called with a hostile name: every tool with it as a path, those with a config as values, too."""
    config = str(ROOT / "configs/cls/digits/vmamba-nano_digits.py")
    values = ["--work-dir", name, "--cfg-options", f"train_dataloader.dataset.data_root={name}", f"model.{name}={name}",
              f"test_dataloader.dataset.data_root={name}", f"experiment_name={name}"]  # fmt: skip
    calls = [(str(tool.relative_to(ROOT)), [name, name]) for tool in sorted((ROOT / "tools").rglob("*.py"))]
    return [
        *calls,
        ("demo/image_demo.py", ["cls", name, name, "--weights", name, "--out-dir", name]),
        ("demo/image_demo.py", ["cls", config, name, "--weights", name, "--device", name]),
        ("tools/train.py", [config, *values]),
        ("tools/train.py", [config, "--resume", name]),
        ("tools/test.py", [config, name, *values, "--out", name, "--show-dir", name]),
    ]


def _run(folder: Path, tool: str, arguments: list[str]) -> tuple[int, str]:
    errors = folder / "errors"
    child = os.fork()
    if child == 0:
        signal.alarm(_LIMIT)
        out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        (folder / "here").mkdir(exist_ok=True)
        os.chdir(folder / "here")
        sys.argv = [str(ROOT / tool), *arguments]
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 (as the interpreter would)
            import traceback

            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = errors.read_text(errors="replace").strip().splitlines()
    return status, lines[-1] if lines else ""


def main(folder: Path) -> None:
    import mmpretrain.datasets
    import mmpretrain.models  # noqa: F401
    from hostile_names import HOSTILE

    import mmvmamba.apis
    import mmvmamba.models  # noqa: F401

    answers = [
        [tool, arguments, *_run(folder, tool, arguments)] for name in HOSTILE for tool, arguments in _calls(name)
    ]
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
