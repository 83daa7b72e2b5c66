"""Downloads: from a server of our own over https, whole or not at all."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import ssl
import subprocess
import threading
import warnings

import pytest
import torch

from mmvmamba.checkpoints import download, read_checkpoint, read_manifest
from mmvmamba.checkpoints.manifest import manifest_path
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch
from tests.test_checkpoints.mutations import stored

DATA = stored("bare")
DIGEST = hashlib.sha256(DATA).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.partition("?")[0].rpartition("/")[2]
        if name == "to-http":
            self._answer(302, b"", Location="http://localhost/weights.pth")
        elif name == "to-https":
            self._answer(302, b"", Location=f"{self.server.address}/weights.pth")
        elif name == "cut.pth":
            self._answer(200, DATA[:1000], **{"Content-Length": str(len(DATA))})
        elif name == "no-length.pth":
            self._answer(200, DATA, **{"Content-Length": ""})
        elif name == "huge.pth":
            self._answer(200, DATA, **{"Content-Length": str(1 << 50)})
        elif name.startswith("weights"):
            self._answer(200, DATA + self.server.more)
        else:
            self._answer(404, b"<html>Not Found</html>")

    def _answer(self, code, body, **headers):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return folder


@pytest.fixture
def server(certificate, tmp_path, monkeypatch):
    """An https server that this process trusts, and an empty cache."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.asked, server.more = [], b""
    server.address = f"https://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "certificate.pem"))
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub/checkpoints"


def _left(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != ".mmvmamba.lock")


def test_a_known_hash_is_proved_and_the_cache_is_used(server, cache, capsys):
    url = f"{server.address}/a/weights.pth?x=1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert len(read_checkpoint(f"{url}#sha256={DIGEST}")["state_dict"]) == 6
    assert server.asked == ["/a/weights.pth?x=1"]
    assert _left(cache) == ["weights.pth", "weights.pth.json"]
    manifest = read_manifest(cache / "weights.pth")
    assert manifest.sha256 == DIGEST and manifest.source == {"url": url} and manifest.size == len(DATA)
    assert "downloading" in capsys.readouterr().err


def test_a_url_without_hash_is_trusted_once_and_says_what_to_write(server, cache):
    url = f"{server.address}/weights.pth"
    with pytest.warns(UserWarning, match=f"no known sha256.*write {url}#sha256={DIGEST}"):
        read_checkpoint(url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_checkpoint(url)
    assert len(server.asked) == 1


def test_a_changed_file_in_the_cache_is_noticed(server, cache):
    url = f"{server.address}/weights.pth#sha256={DIGEST}"
    read_checkpoint(url)
    data = bytearray(DATA)
    data[len(data) // 2] ^= 1
    (cache / "weights.pth").write_bytes(bytes(data))
    with pytest.raises(HashMismatch, match="weights.pth"):
        read_checkpoint(url)
    (cache / "weights.pth").write_bytes(DATA[:-1])
    with pytest.raises(CorruptCheckpoint, match="weights.pth"):
        read_checkpoint(url)


def test_another_file_than_the_hash_says_is_not_kept(server, cache):
    server.more = b"\0"
    with pytest.raises(HashMismatch, match=f"expected {DIGEST}"):
        read_checkpoint(f"{server.address}/weights.pth#sha256={DIGEST}")
    assert _left(cache) == []


def test_a_cached_file_is_held_against_a_hash_given_later(server, cache):
    with pytest.warns(UserWarning, match="no known sha256"):
        read_checkpoint(f"{server.address}/weights.pth")
    with pytest.raises(HashMismatch, match="Delete the file"):
        read_checkpoint(f"{server.address}/weights.pth", sha256="0" * 64)


def test_a_file_put_into_the_cache_by_hand_is_proved(server, cache):
    cache.mkdir(parents=True)
    (cache / "weights.pth").write_bytes(DATA)
    read_checkpoint(f"{server.address}/weights.pth#sha256={DIGEST}")
    assert server.asked == [] and read_manifest(cache / "weights.pth").sha256 == DIGEST
    manifest_path(cache / "weights.pth").unlink()
    (cache / "weights.pth").write_bytes(DATA + b"\0")
    with pytest.raises(HashMismatch, match="Delete the file"):
        read_checkpoint(f"{server.address}/weights.pth#sha256={DIGEST}")


def test_two_urls_that_end_alike_are_two_files(server, cache):
    for folder in ("a", "b", "a", "b"):
        read_checkpoint(f"{server.address}/{folder}/weights.pth#sha256={DIGEST}")
    assert server.asked == ["/a/weights.pth", "/b/weights.pth"]
    assert len(_left(cache)) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", "404"),
        ("cut.pth", "ended after 1000 of"),
        ("huge.pth", "no room|largest size"),
        ("to-http", "expected https all the way"),
    ],
)
def test_failed_downloads_leave_nothing(name, message, server, cache):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(f"{server.address}/{name}")
    assert _left(cache) == []


def test_redirections_within_https_and_answers_without_length(server, cache):
    for name in ("to-https", "no-length.pth"):
        assert len(read_checkpoint(f"{server.address}/{name}#sha256={DIGEST}")["state_dict"]) == 6


def test_what_never_ends_is_cut_off(server, cache, monkeypatch):
    monkeypatch.setattr(download, "MAX_SIZE", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_checkpoint(f"{server.address}/no-length.pth")
    assert _left(cache) == []


def test_an_unknown_certificate_is_refused(server, cache, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CheckpointError, match="could not be downloaded to .*CERTIFICATE_VERIFY_FAILED"):
        read_checkpoint(f"{server.address}/weights.pth")


@pytest.mark.parametrize("url", ["http://localhost/x.pth", "ftp://localhost/x.pth", "file:///etc/passwd", "https:///x"])
def test_other_roads_than_https(url, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match="expected an https URL"):
        read_checkpoint(url)


@pytest.mark.parametrize(
    ("url", "sha256", "message"),
    [
        ("https://h/x.pth#sha256=abc", None, "expected 64 hexadecimal digits"),
        (f"https://h/x.pth#sha256={DIGEST}", "0" * 64, "given twice"),
        ("https://h/x.pth", "abc", "expected 64 hexadecimal digits"),
    ],
)
def test_hashes_that_are_none(url, sha256, message):
    with pytest.raises(HashMismatch, match=message):
        download.fetch(url, sha256)


def test_a_url_that_names_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for url in ("https://h/", "https://h/..", "https://h/a/%2e%2e", "https://h/.lock", "https://h/x.pth.json"):
        with pytest.raises(CheckpointError, match="names no file"):
            download.fetch(url)


def test_failed_downloads_say_where_the_file_belongs(tmp_path, monkeypatch):
    def no_network(url):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(download, "open_url", no_network)
    with pytest.raises(CheckpointError, match=r"could not be downloaded to .*checkpoints/w\.pth.*no route to host"):
        read_checkpoint("https://example.org/w.pth")


def test_of_many_processes_one_downloads(server, cache):
    """As the ranks of a training ask, all at once."""
    url = f"{server.address}/weights.pth#sha256={DIGEST}"
    threads = [threading.Thread(target=read_checkpoint, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1
