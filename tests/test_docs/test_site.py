"""The site is built without a warning, without a network, and says what its sources say."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("mmengine")

ROOT = Path(__file__).parents[2]
#: What a browser fetches by itself: scripts, style sheets, pictures, fonts.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|embed)\b[^>]*\bsrc=\"(https?:|//)|<link\b(?=[^>]*\brel=\"(?:stylesheet|preload|icon|preconnect)\")"
    r"[^>]*\bhref=\"(https?:|//)|@import\s+(?:url\()?[\"']?(https?:|//)|url\(\s*[\"']?(https?:|//)"
)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; any warning of Sphinx, or a reference without a target, is an error."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(folder / "doctrees")]
    # A proxy that is not there: whatever asked the network would fail.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(folder / "html")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **nowhere, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / "html"


@pytest.mark.slow
def test_every_document_is_a_page(site: Path) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        page = path.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / page).is_file(), page


@pytest.mark.slow
def test_readers_fetch_nothing_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".js")]
    assert len(files) > 30
    for path in files:
        found = FETCHED.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(site)}: {found[0]}"


@pytest.mark.slow
def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    text = (site / "concepts.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 20 and text.count('display="block"') >= 4
    assert "$$" not in text and "\\exp" not in text


@pytest.mark.slow
def test_functions_are_documented(site: Path) -> None:
    for page, name in (
        ("ops", "mmvmamba.ops.scan2d"),
        ("models", "mmvmamba.models.VMamba"),
        ("apis", "mmvmamba.apis.inferencer"),
    ):
        assert f'id="{name}"' in (site / "api" / f"{page}.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_generated_pages_are_those_of_their_sources() -> None:
    """``python scripts/make_docs.py`` would change nothing."""
    pytest.importorskip("mmdet")
    for path, text in script("make_docs").pages().items():
        assert path.is_file() and path.read_text(encoding="utf-8") == text, f"{path}: run scripts/make_docs.py"


def test_pages_that_are_out_of_date_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_docs = script("make_docs")
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "gone.md").write_text("of a part that is no more")
    (tmp_path / "page.md").write_text("old")
    monkeypatch.setattr(make_docs, "DOCS", tmp_path)
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    monkeypatch.setattr(make_docs, "pages", lambda: {tmp_path / "page.md": "new"})
    monkeypatch.setattr(sys, "argv", ["make_docs.py", "--check"])
    with pytest.raises(SystemExit, match="page.md, api/gone.md. Run python scripts/make_docs.py"):
        make_docs.main()
    assert (tmp_path / "page.md").read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["make_docs.py"])
    make_docs.main()
    assert (tmp_path / "page.md").read_text() == "new" and not (tmp_path / "api" / "gone.md").exists()


def test_a_docstring_without_its_table_is_an_error(tmp_path: Path) -> None:
    make_docs = script("make_docs")
    source = tmp_path / "module.py"
    source.write_text('"""Nothing to see."""\n')
    with pytest.raises(ValueError, match="found no table"):
        make_docs.docstring_table(source)
    source.write_text('"""One.\n\n| variable | meaning |\n|---|---|\n| ``A`` | b |\n"""\n')
    assert make_docs.docstring_table(source) == "| variable | meaning |\n|---|---|\n| `A` | b |"


def test_every_environment_variable_is_on_its_page() -> None:
    page = (ROOT / "docs/environment.md").read_text()
    for source in ("mmvmamba/envs.py", "setup.py", "scripts/bootstrap.py"):
        code = (ROOT / source).read_text()
        for name in set(re.findall(r"(?:environ(?:\.get\(|\[)|env(?:\.get\(|\[)|_choice\(env, )\"([A-Z_]+)\"", code)):
            assert f"`{name}`" in page or name in ("PATH", "CI"), f"{name} of {source}"


def test_all_27_questions_are_answered() -> None:
    found = re.findall(r"^### (\d+)\. .+\n\n(.+)", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert sorted(int(number) for number, _ in found) == list(range(1, 28))


def test_pages_name_what_there_is() -> None:
    """Files of this repository that the pages name, also outside of commands and links."""
    for path in (ROOT / "docs").rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        for name in set(
            re.findall(
                r"\b(?:configs|tools|demo|scripts|tests|benchmarks|csrc|mmvmamba)/[\w./-]*\w\.(?:py|sh|md)\b", text
            )
        ):
            invented = re.search(r"/mine(?:_cpu)?\.py$|with_fsdp", name)
            assert invented or (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_figures_of_the_concepts_are_the_operator() -> None:
    """The weights that are drawn, against the closed form."""
    drawing = script("draw_concepts")
    step, (row, column) = 0.3, drawing.QUERY
    seen = drawing.weights(drawing.ScanOrder.ROW, step).flatten()
    last = row * drawing.SIDE + column
    expected = [step * math.exp(-step * (last - t)) if t <= last else 0.0 for t in range(len(seen))]
    torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float64))
    parts = [drawing.weights(order, step) for order in drawing.CROSS_SCAN]
    torch.testing.assert_close(torch.stack(parts).sum(0), drawing.weights(drawing.CROSS_SCAN, step))
