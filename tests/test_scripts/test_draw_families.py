"""The page of the families is drawn from the code, the metafiles and the benchmark that are there."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from mmvmamba.models.backbones import FAMILIES
from tests.nano_models import ROOT

PAGE = (ROOT / "docs" / "families.md").read_text()


def test_page_and_drawings_are_up_to_date():
    command = [sys.executable, "scripts/draw_families.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn_and_told(family):
    image = f"images/families/{family}.svg"
    assert f"({image})" in PAGE
    svg = ET.parse(ROOT / "docs" / image).getroot()  # noqa: S314 (our own file)
    assert svg.tag.endswith("svg") and float(svg.get("width", "0")) < 1000
    texts = [text for element in svg.iter() if element.tag.endswith("text") and (text := element.text)]
    assert "block" in " ".join(texts)


def test_every_variant_has_its_time():
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| \w+ \| `", line)]
    assert {row[0].strip() for row in rows} == {cls.__name__ for cls in FAMILIES.values()}
    timed = [all(re.fullmatch(r" \d+\.\d+ ", cell) for cell in row[-4:]) for row in rows]
    without = {row[1].strip(" `") for row, has_times in zip(rows, timed, strict=True) if not has_times}
    # 300 million parameters are too many for the benchmark's machine; b2 and b4 are b1's network.
    assert without == {"large40", "large48", "reg-large", "b2", "b4"}
