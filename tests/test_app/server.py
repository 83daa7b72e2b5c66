"""``demo/app.py`` in a process that writes down whom it wanted to reach: the first argument is the file for that."""

from __future__ import annotations

import importlib.util
import ipaddress
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def is_here(address: Any) -> bool:
    """Return whether a socket's address, or a host name, is of this machine."""
    host = address[0] if isinstance(address, tuple) else address
    if host in ("localhost", "", None) or not isinstance(address, (tuple, str)):
        return True
    if isinstance(address, str) and "/" in address:  # a socket in the file system
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def watch(record: Path) -> None:
    """Write down from now on what this process wants to reach that is not of this machine."""
    record.touch()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        address = {"socket.connect": 1, "socket.getaddrinfo": 0}.get(event)
        if address is not None and not is_here(arguments[address]):
            with record.open("a") as file:
                file.write(f"{event} {arguments[address]!r}\n")

    sys.addaudithook(note)


def main() -> None:
    """Serve the page."""
    watch(Path(sys.argv.pop(1)))
    spec = importlib.util.spec_from_file_location("app", ROOT / "demo/app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from mmvmamba.apis import run_command

    run_command(module.main)


if __name__ == "__main__":
    main()
