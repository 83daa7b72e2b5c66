"""A page in the browser that shows what a model sees: ``python demo/app.py``.

Choose a picture, a task, a model and its weights; the page shows the answer, how long it took, its classes, and where
the scans of the backbone look from a pixel. It offers the models of ``make demo`` first. Needs
``pip install 'mmvmamba[app]'``.
"""

from __future__ import annotations

import argparse
import signal
import sys

from mmvmamba.apis import run_command


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demo-dir",
        default="work_dirs/demo",
        help="where `make demo` left its weights (default: %(default)s)",
    )
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, for this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="0 takes any that is free (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Serve the page."""
    args = parse_args()
    from mmvmamba.apis.app_server import serve, warning_for

    warning = warning_for(args.host)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)

    # As Ctrl-C, so that uploads in the temporary folder do not outlive the page.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def started(address: str) -> None:
        print(f"The page is at {address}\nCtrl-C ends it.", flush=True)

    serve(args.demo_dir, host=args.host, port=args.port, device=args.device, started=started)


if __name__ == "__main__":
    run_command(main)
