"""Serving the demo page: on this machine alone unless asked otherwise, and without calls to anyone else."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from mmvmamba.apis.app import Models
from mmvmamba.apis.app_html import CSS
from mmvmamba.apis.app_page import build_page
from mmvmamba.datasets.samples import write_samples
from mmvmamba.errors import ConfigError
from mmvmamba.optional import optional_package

LOOPBACK = ("127.0.0.1", "localhost")
#: Most that may be uploaded at once.
MAX_UPLOAD = "40mb"
_ANY_INTERFACE = ("0.0.0.0", "::")  # noqa: S104 - only compared with, to print a warning
# The browser itself refuses what the page would load from, or send to, another machine.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class Headers:
    """ASGI middleware that adds headers to every answer.

    Args:
        app: What answers.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def serve(
    demo_dir: str | Path,
    *,
    host: str = LOOPBACK[0],
    port: int = 7860,
    device: str | None = None,
    started: Callable[[str], None] = print,
) -> None:
    """Serve the demo page until Ctrl-C.

    Args:
        demo_dir: Work folder of ``make demo``, whose checkpoints are offered first.
        host: Address to listen at. The page reads checkpoint files and fetches weights for whoever reaches it; configs
            that are not on its list, which are Python, it reads on ``LOOPBACK`` alone.
        port: Port to listen at; 0 for any that is free.
        device: Such as ``"cuda:0"``; by default the accelerator, if there is one.
        started: Called with the address of the page, once it answers.

    Raises:
        MissingPackage: If gradio or scikit-learn is not installed.
        ConfigError: If the address cannot be listened at or there is no such kind of device.
    """
    with tempfile.TemporaryDirectory(prefix="mmvmamba-app-") as folder:
        models = Models(demo_dir, device, typed_configs=host in LOOPBACK, uploads=folder)
        _be_private(folder)
        gr = optional_package("gradio", "app")
        optional_package("sklearn", "app")
        port = _free_port(host, port)
        samples = Path(folder, "samples")
        samples.mkdir()
        page = build_page(models, write_samples(samples))
        page.queue(api_open=False)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                show_error=True,
                prevent_thread_lock=True,
                enable_monitoring=False,
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                footer_links=[],
                max_file_size=MAX_UPLOAD,
                state_session_capacity=16,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
                app_kwargs=dict(middleware=_middleware(host)),
            )
            started(str(page.local_url))
            page.block_thread()
        finally:
            page.close()


def _be_private(folder: str) -> None:
    """Tell gradio and what it imports, before it is imported, to report nothing and to keep uploads in a folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = folder


def _middleware(host: str) -> list[Any]:
    """Return the headers and, on this machine alone, the refusal of other host names.

    A foreign page whose name was made to point to 127.0.0.1 would otherwise be of the same origin as ours.
    """
    module = optional_package("starlette.middleware", "app")
    trusted = optional_package("starlette.middleware.trustedhost", "app").TrustedHostMiddleware
    layers = [module.Middleware(Headers)]
    if host in LOOPBACK:
        layers.append(module.Middleware(trusted, allowed_hosts=list(LOOPBACK)))
    return layers


def _free_port(host: str, port: int) -> int:
    """Return a port that can be listened at: the one given, or any for 0."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"port is {port}, expected 0 to 65535. Correct it; 0 takes any that is free.")
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror or error}), expected an address of this machine and a "
            "port that nobody else uses. Name others with --host and --port; port 0 takes any that is free."
        ) from error


def warning_for(host: str) -> str | None:
    """Return what must be known before others can reach the page, None where they cannot."""
    if host in LOOPBACK:
        return None
    where = "on every network of this machine" if host in _ANY_INTERFACE else f"at {host}"
    return (
        f"the page is served {where}: whoever reaches it can make this machine compute, read checkpoint files and "
        "fetch weights from https addresses. There is no password. Config files can be chosen from the list only."
    )
