"""Runs ``tools/train.py`` in forks of a process that has imported all of it: a trial takes its training's time only.

One JSON object per line comes in (``arguments`` of the command line, ``log`` file, ``kill_after`` seconds or null),
and one goes out (``status`` as of ``subprocess``, ``seconds``). The server itself computes nothing: threads do not
survive a fork.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _preload():
    import mmpretrain.datasets
    import mmpretrain.engine
    import mmpretrain.evaluation
    import mmpretrain.models
    import mmpretrain.visualization  # noqa: F401

    import mmvmamba.apis
    import mmvmamba.engine
    import mmvmamba.models  # noqa: F401


def _run(arguments, log):
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = [str(ROOT / "tools/train.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter would)
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(child, kill_after):
    """Return the child's status; kill its process alone, as the kernel would, when its time is over."""
    end = time.monotonic() + (600 if kill_after is None else kill_after)
    while True:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.001)


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imported modules print
    _preload()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(order["arguments"], order["log"])
        status = _wait(child, order["kill_after"])
        print(json.dumps({"status": status, "seconds": time.monotonic() - begin}), file=answers, flush=True)


if __name__ == "__main__":
    main()
