"""The demo page as gradio has it, and the server around it, without a browser."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
pytest.importorskip("sklearn")

from mmvmamba.apis.app import Models
from mmvmamba.apis.app_page import build_page
from mmvmamba.apis.app_server import Headers, _free_port, serve, warning_for
from mmvmamba.datasets.samples import write_samples
from mmvmamba.errors import ConfigError, MissingPackage
from tests.nano_models import ROOT, script


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return build_page(Models(folder, "cpu"), write_samples(folder))


def test_page_reports_nothing_and_offers_no_interface_to_programs(page):
    assert page.analytics_enabled is False
    config = page.get_config_file()
    assert config["dependencies"] and all(event["api_visibility"] == "private" for event in config["dependencies"])
    assert "flag" not in json.dumps([part["props"].get("value") for part in config["components"]]).lower()
    outside = [part for part in config["components"] if "https://" in json.dumps(part["props"].get("value"))]
    assert outside == []


def test_every_input_has_a_label_and_pictures_have_words(page):
    inputs = ("image", "radio", "dropdown", "textbox", "slider", "number", "button")
    parts = [part for part in page.get_config_file()["components"] if part["type"] in inputs]
    assert len(parts) > 15
    for part in parts:
        assert part["props"].get("label") or part["props"].get("value"), part
        if part["type"] == "image":
            assert part["props"]["alt_text"]


def test_without_a_trained_demo_the_page_says_how_to_get_one(page):
    (message,) = [part for part in page.get_config_file()["components"] if part["props"].get("elem_id") == "message"]
    assert "make demo" in message["props"]["value"]


def test_missing_gradio_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackage, match=r"pip install 'mmvmamba\[app\]'"):
        serve(tmp_path, device="cpu")


@pytest.mark.parametrize(("host", "typed"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])  # noqa: S104
def test_configs_can_be_typed_by_who_sits_here_alone_and_none_is_read_from_uploads(host, typed, tmp_path, monkeypatch):
    class Built(Exception):
        """Carries the models out before anything is served."""

    def build(models, _samples):
        raise Built(models)

    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "to be restored")
    monkeypatch.setattr("mmvmamba.apis.app_server.build_page", build)
    with pytest.raises(Built) as found:
        serve(tmp_path, host=host, port=0, device="cpu")
    (models,) = found.value.args
    assert models.typed_configs is typed
    assert models.uploads == Path(os.environ["GRADIO_TEMP_DIR"]).resolve()


def test_addresses(monkeypatch):
    assert warning_for("127.0.0.1") is None and warning_for("localhost") is None
    assert "on every network" in warning_for("::") and "no password" in warning_for("192.168.0.7")
    monkeypatch.setattr(sys, "argv", ["app.py"])
    assert script("demo/app.py").parse_args().host == "127.0.0.1"
    assert 0 < _free_port("127.0.0.1", 0) < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port} .*--port"):
            _free_port("127.0.0.1", port)
    for host, port in (("127.0.0.1", 70000), ("no.such.host.invalid", 7860)):
        with pytest.raises(ConfigError, match=str(port)):
            _free_port(host, port)


def test_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-W", "ignore", str(ROOT / "demo/app.py"), "--device", "typewriter"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: device is 'typewriter'")


def test_every_answer_has_the_headers():
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"c"})

    async def send(message):
        sent.append(message)

    asyncio.run(Headers(app)({"type": "http"}, None, send))
    names = [name for name, _ in sent[0]["headers"]]
    assert names == [b"a", b"content-security-policy", b"referrer-policy", b"x-content-type-options"]
    assert sent[1] == {"type": "http.response.body", "body": b"c"}


def test_the_guard_of_the_browser_test_sees_what_leaves_the_machine(tmp_path):
    code = (
        f"import contextlib, sys, socket; sys.path.insert(0, {str(Path(__file__).parent)!r}); import server, pathlib\n"
        f"server.watch(pathlib.Path({str(tmp_path / 'record')!r}))\n"
        "socket.getaddrinfo('127.0.0.1', 80)\n"
        "one, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))\n"  # UDP sends nothing yet
        "one.connect(('127.0.0.1', 9))\n"
        "with contextlib.suppress(OSError):\n"  # a machine without a network refuses, after the attempt
        "    other.connect(('192.0.2.1', 9))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "record").read_text() == "socket.connect ('192.0.2.1', 9)\n"
