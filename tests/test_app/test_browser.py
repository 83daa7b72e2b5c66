"""The demo page in headless Chromium: it answers, says what is wrong, needs no mouse, and stays at home."""

from __future__ import annotations

import base64
import re
import urllib.parse

import cv2
import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmvmamba.apis.app import enlargement
from mmvmamba.datasets.samples import write_samples
from tests.nano_models import nano_checkpoint
from tests.test_app.browser import NARROW, WIDE, browser, choose, chromium, opened, run, screenshot, served

pytestmark = pytest.mark.slow  # models are loaded three times, in a browser


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory):
    """A demo of models with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    for task in ("det", "seg", "cls"):
        (folder / task).mkdir()
        file = nano_checkpoint(task, folder / task)
        (folder / task / "last_checkpoint").write_text(f"/elsewhere/{file.name}")
    return folder


@pytest.fixture(scope="module")
def server(demo_dir, tmp_path_factory):
    chromium()
    with served(demo_dir, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def started(server):
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return {sample.name: cv2.imread(str(sample.path)) for sample in write_samples(tmp_path_factory.mktemp("samples"))}


@pytest.fixture(scope="module")
def answered(started, server):
    """The page after a sample was run through the detector, with all requests, errors and warnings it had."""
    page = started.new_page(viewport=WIDE)
    page.requests, page.faults = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(120_000)
    page.goto(server[0])
    choose(page, "digits 1")
    run(page)
    yield page
    page.close()


def _scan_maps(page) -> list[np.ndarray]:
    sources = page.locator("#scans img").evaluate_all("images => images.map(image => image.src)")
    content = [base64.b64decode(source.partition("base64,")[2]) for source in sources]
    return [cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_COLOR) for one in content]


def _drawing(page, server) -> np.ndarray:
    content = page.request.get(page.locator("#drawing img").get_attribute("src")).body()
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def _colours(image: np.ndarray) -> int:
    return len(np.unique(image.reshape(-1, 3), axis=0))


def test_sample_gives_answer_timing_table_and_scan_maps(answered, server, samples):
    page, picture = answered, samples["digits 1"]
    height, width = picture.shape[:2]
    text = page.locator("#message").inner_text()
    assert re.search(r"Answered in \d+ ms on cpu; picture of (\d+) x (\d+) pixels", text).groups() == (
        str(width), str(height),
    )  # fmt: skip
    factor = enlargement(picture)
    drawing = _drawing(page, server)
    assert drawing.shape == (height * factor, width * factor, 3)
    plain = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    assert 0.02 < (drawing != plain).any(-1).mean() < 1, "nothing was drawn, or another picture"
    caption = page.locator("#table caption").inner_text()
    counts = [int(cell) for cell in page.locator("#table tbody td:nth-child(2)").all_inner_texts()]
    assert caption == f"{sum(counts)} objects of score 0.50 or more" and counts
    maps = _scan_maps(page)
    assert len(maps) == 5 and {image.shape for image in maps} == {drawing.shape}
    assert all(_colours(image) > 50 for image in maps)


def test_nothing_leaves_the_machine(answered, server):
    address, record = server
    assert len(answered.requests) > 10
    outside = [url for url in answered.requests if not url.startswith((address, "data:", "blob:"))]
    assert outside == []
    assert record.read_text() == ""  # nor did the server want to
    assert answered.faults == []
    answer = answered.request.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    port = urllib.parse.urlsplit(address).port
    foreign = answered.request.get(address, headers={"Host": f"somewhere.example:{port}"})
    assert foreign.status == 400, "a foreign name for this machine is refused"


def test_everything_that_can_be_used_has_a_name(answered):
    tree = answered.locator("body").aria_snapshot()
    nameless = re.findall(r"- (?:button|textbox|combobox|radio|slider|spinbutton)(?: \[[^\]]*\])*:?\s*$", tree, re.M)
    assert nameless == []
    for name in ("Weights", "Model", "Layer"):
        assert re.search(rf'- (textbox|combobox) "{name}', tree), name
    images = answered.locator("img:visible").evaluate_all("images => images.map(image => image.getAttribute('alt'))")
    assert len(images) > 8 and None not in images
    assert answered.locator("h1").count() == 1
    assert answered.locator("html").get_attribute("lang") == "en"


def test_click_on_the_answer_shows_the_maps_of_that_pixel(answered, samples):
    page, (height, width) = answered, samples["digits 1"].shape[:2]
    before = _scan_maps(page)
    box = page.locator("#drawing img").bounding_box()
    scale = min(box["width"] / width, box["height"] / height)  # the picture is centred in its frame
    left, top = (box["width"] - scale * width) / 2, (box["height"] - scale * height) / 2
    row, column = 30, 150
    page.locator("#drawing img").click(position={"x": left + (column + 0.5) * scale, "y": top + (row + 0.5) * scale})
    note = page.locator("#scans .scan-note")
    note.get_by_text(re.compile(r"row (29|30|31), column (149|150|151) ")).wait_for()
    assert abs(int(page.get_by_label("Row").input_value()) - row) <= 1
    after = _scan_maps(page)
    assert len(after) == len(before) and any((one != other).any() for one, other in zip(before, after, strict=True))
    page.get_by_role("radio", name="QKᵀ").check()
    note.get_by_text("Shown: QKᵀ of").wait_for()


def test_keyboard_alone_is_enough(started, server):
    page = opened(started, server[0], WIDE)
    names = []
    for _ in range(60):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.innerText").strip())
        if names[-1] == "digits 2":
            page.keyboard.press("Enter")
            page.locator("#picture img").wait_for()
        if names[-1] == "Run":
            page.keyboard.press("Space")
            break
    else:
        raise AssertionError(f"Tab does not come to Run: {names}")
    page.locator("#message").get_by_text("Answered in").wait_for()
    page.locator("#scans img").first.wait_for()
    page.get_by_label("Row").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.locator("#scans .scan-note").get_by_text("row 7,").wait_for()
    page.close()


def test_wrong_weights_and_broken_pictures_are_said_in_the_page(started, server, demo_dir, tmp_path):
    page = opened(started, server[0], WIDE)
    page.get_by_role("button", name="Run").click()
    alert = page.get_by_role("alert")
    alert.get_by_text("there is no picture").wait_for()
    choose(page, "digits 4")
    weights = page.get_by_role("textbox", name="Weights")
    good = weights.input_value()
    assert good == str(demo_dir / "det" / "det.pth")
    weights.fill("/no/such/<b>file</b>.pth")
    weights.press("Enter")
    alert.get_by_text("/no/such/<b>file</b>.pth").wait_for()  # as text, not as HTML
    weights.fill(str(demo_dir / "seg" / "seg.pth"))
    page.get_by_role("button", name="Run").click()
    alert.get_by_text("decode_head").wait_for()
    assert page.locator("#drawing img").count() == 0 and page.locator("#scans img").count() == 0
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    weights.fill(good)
    page.get_by_role("button", name="Remove Image").or_(page.get_by_role("button", name="Clear")).first.click()
    page.locator("#picture input[type=file]").set_input_files(str(broken))
    page.locator("#picture img").wait_for(state="attached")
    page.get_by_role("button", name="Run").click()
    alert.get_by_text(re.compile("broken.png.*cannot be decoded")).wait_for()
    page.close()


def test_segments_and_pictures_of_every_width_of_window(started, server, tmp_path):
    page = opened(started, server[0], NARROW)
    choose(page, "digits 1", task="Segments")
    run(page)
    assert page.locator("#table caption").inner_text() == "Share of the picture by class"
    shares = [float(cell.rstrip("%")) for cell in page.locator("#table tbody td").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)
        image = cv2.imread(str(screenshot(page, tmp_path / "page.png")))
        assert image.shape == (size["height"], size["width"], 3)
        assert _colours(image) > 1000 and image.std() > 20, "the page is blank"
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "it scrolls sideways"
        parts = ("picture", "samples", "run", "drawing", "table", "scans")
        boxes = {part: page.locator(f"#{part}").bounding_box() for part in parts}
        assert all(box["width"] > 100 and box["height"] > 20 for box in boxes.values()), boxes
        assert not any(_overlap(boxes[a], boxes[b]) for a in boxes for b in boxes if a < b), boxes
    page.close()


def _overlap(first: dict[str, float], second: dict[str, float]) -> bool:
    return all(
        first[start] < second[start] + second[length] - 1 and second[start] < first[start] + first[length] - 1
        for start, length in (("x", "width"), ("y", "height"))
    )
