"""How a training ends when it does not end by itself: advice for want of memory and workers, exit codes for signals."""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from mmengine.runner import Runner, find_latest_checkpoint
from torch.distributed.elastic.multiprocessing.errors import record

from mmvmamba.engine import InterruptHook, LastBatchHook
from mmvmamba.engine.batches import image_shapes
from mmvmamba.errors import MMVMambaError, NonFiniteLossError, OutOfMemory, TrainingInterrupted, WorkerError

#: What PyTorch's allocator for the CPU writes into its RuntimeError, which has no class of its own.
_CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
#: PyTorch's words for a DataLoader worker that is gone, and for one that gives no batch within the loader's timeout.
_WORKER_GONE = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)")
_WORKER_HANGS = "DataLoader timed out after"
#: Seconds that workers are given to end.
_LAST_WORDS = 3.0


def train(runner: Runner) -> None:
    """Let a runner train; the signal handlers are as before when this returns or raises.

    Raises:
        OutOfMemory: If there was not enough memory.
        WorkerError: If a DataLoader worker died or gave no batch in time.
        NonFiniteLossError: As ``NonFiniteHook`` says, with the newest checkpoint.
        KeyboardInterrupt: After Ctrl-C was pressed twice. All other exceptions are those of ``runner.train``.
    """
    guards = [hook for hook in runner.hooks if isinstance(hook, InterruptHook)]
    try:
        runner.train()
    except Exception as error:
        if any(guard.at_once for guard in guards):
            # Code that was interrupted by Ctrl-C has turned it into an error of its own, as Config.pretty_text does.
            raise KeyboardInterrupt from error
        if is_out_of_memory(error):
            raise OutOfMemory(_advice(runner, error)) from error
        if is_worker_failure(error):
            raise WorkerError(_worker_advice(runner, error)) from error
        if isinstance(error, NonFiniteLossError):
            raise NonFiniteLossError(f"{error}\n  {_saved(runner)}") from error
        raise
    finally:
        for guard in guards:
            guard.restore()


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run the main function of a command line and exit as a shell expects.

    0 after success, 1 with one line after an error that mmvmamba raises on purpose, 128 plus the number of the signal
    that has ended a training. Other exceptions keep their traceback. Under torchrun the first process that fails leaves
    its exception for torchrun's summary.
    """
    try:
        record(main)()
    except TrainingInterrupted as stop:
        # The checkpoint is written: what the scheduler sends now must not change the exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        sys.stderr.write(f"interrupted: {stop}\n")
        _end_workers()
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted by Ctrl-C; nothing was saved at this point, earlier checkpoints are untouched\n")
        _end_workers()
        sys.exit(128 + signal.SIGINT)
    except MMVMambaError as error:
        _end_workers()
        sys.exit(f"error: {error}")
    sys.exit(0)


def _end_workers() -> None:
    """End the workers of DataLoaders: Python would wait for each, for one that hangs for ever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:  # PyTorch's handler raises an error for each worker that dies of a signal
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.terminate()
    end = time.monotonic() + _LAST_WORDS
    for worker in workers:
        worker.join(max(end - time.monotonic(), 0))
        if worker.is_alive():
            worker.kill()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory, of a GPU or of the machine, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATOR)


def is_worker_failure(error: BaseException) -> bool:
    """Return whether an exception is PyTorch's for a DataLoader worker that died or gave no batch in time."""
    text = str(error)
    return isinstance(error, RuntimeError) and (_WORKER_GONE.match(text) is not None or text.startswith(_WORKER_HANGS))


def _worker_advice(runner: Runner, error: BaseException) -> str:
    if str(error).startswith(_WORKER_HANGS):
        what = "gave no batch in time"
        advice = (
            "look for a sample that takes for ever (a lock, a network drive), with --cfg-options "
            "train_dataloader.num_workers=0 in the main process; or a longer train_dataloader.timeout"
        )
    else:
        what = "died"
        advice = (
            "fewer workers (--cfg-options train_dataloader.num_workers=1) where memory ran out, as the system's log "
            "says; more shared memory (/dev/shm, docker run --shm-size=8g) after a bus error; num_workers=0 shows "
            "where a library crashes"
        )
    return (
        f"a DataLoader worker {what} after iteration {runner.iter}: {_first_sentences(error)}\n"
        f"  try one of: {advice}\n"
        f"  {_saved(runner)}"
    )


def _saved(runner: Runner) -> str:
    checkpoint = find_latest_checkpoint(runner.work_dir)
    if checkpoint is None or not Path(checkpoint).is_file():
        return "there is no checkpoint yet"
    return f"the newest checkpoint, {checkpoint}, is untouched; go on from it with --resume"


def _advice(runner: Runner, error: BaseException) -> str:
    hook = _last_batch(runner)
    validating = hook is not None and hook.stage == "val"
    when = f"the validation after iteration {runner.iter}" if validating else f"iteration {runner.iter + 1}"
    return (
        f"out of memory in {when}, at {_place(error)}: {_first_sentences(error)}\n"
        f"  batch: {_batch(hook)}\n"
        f"  try one of: {'; '.join(_remedies(runner))}\n"
        f"  {_saved(runner)}"
    )


def _last_batch(runner: Runner) -> LastBatchHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, LastBatchHook)), None)


def _batch(hook: LastBatchHook | None) -> str:
    shapes = image_shapes(hook.batch) if hook is not None else []
    if not shapes:
        return "its images are unknown"
    largest = max(shapes, key=lambda shape: shape[-1] * shape[-2])
    many = "1 image" if len(shapes) == 1 else f"{len(shapes)} images"
    return f"{many} per process, the largest {' x '.join(map(str, largest))} (channels, height, width)"


def _remedies(runner: Runner) -> list[str]:
    """Return what the config does not do yet, the cheapest first."""
    cfg = runner.cfg
    remedies = []
    kind = type(runner.optim_wrapper).__name__
    if "Amp" not in kind and "Bfloat16" not in kind:
        remedies.append("--amp (mixed precision)")
    backbone = cfg.get("model", {}).get("backbone", {}) if isinstance(cfg.get("model"), dict) else {}
    if backbone and not backbone.get("with_cp"):
        remedies.append("--cfg-options model.backbone.with_cp=True (recomputes blocks in the backward pass)")
    loader = cfg.get("train_dataloader")
    size = loader.get("batch_size") if isinstance(loader, dict) else None
    if size is None or size > 1:
        smaller = f"={size // 2}" if size else ", smaller"
        remedies.append(
            f"--cfg-options train_dataloader.batch_size{smaller} (adapt the learning rate: --auto-scale-lr; "
            "with --resume the data goes on in the right place, but it is no more the same training)"
        )
    return [*remedies, "smaller images in the pipeline"]


def _place(error: BaseException) -> str:
    """Return the innermost line that is not PyTorch's own."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if "torch" not in Path(frame.filename).parts), frames[-1])
    return f"{frame.filename}:{frame.lineno} ({frame.name})"


def _first_sentences(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " ..."
