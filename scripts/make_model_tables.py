"""Write the tables of models in configs/README.md from the metafiles: ``python scripts/make_model_tables.py``.

With ``--check`` nothing is written; the exit status is 1 if the tables are not those of the metafiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, whether or not one is installed

from mmvmamba.apis.model_index import ModelEntry, ModelResult, list_models  # noqa: E402
from mmvmamba.errors import ConfigError, MMVMambaError  # noqa: E402

CONFIGS = ROOT / "configs"
README = CONFIGS / "README.md"
BEGIN, END = (
    "<!-- written by scripts/make_model_tables.py: begin -->",
    "<!-- written by scripts/make_model_tables.py: end -->",
)
TITLES = {"cls": "ImageNet-1k", "det": "COCO", "seg": "ADE20K"}
METRICS = {
    "cls": {"Top 1 Accuracy": "top-1"},
    "det": {"box AP": "box AP", "mask AP": "mask AP"},
    "seg": {"mIoU": "mIoU", "mIoU(ms+flip)": "mIoU ms+flip"},
}
WHO = {"published by upstream": "upstream", "measured by us": "us"}
FAR = 0.02
"""Count and published count are told apart beyond this."""


def model_tables() -> str:
    """Return the tables of all tasks, without the markers."""
    return "\n\n".join("\n".join(_table(task)) for task in TITLES)


def _table(task: str) -> Iterator[str]:
    models = list_models(task)
    sizes = dict.fromkeys(str(entry.metadata["Input Size"]) for entry in models)
    yield f"### {TITLES[task]}\n"
    heads = ["config", "parameters", "FLOPs" + (f" at {next(iter(sizes))}" if len(sizes) == 1 else "")]
    yield _row([*heads, *METRICS[task].values(), "measured by", "weights"])
    yield _row(["---"] * (len(heads) + len(METRICS[task]) + 2))
    for entry in models:
        for results in _grouped(entry):
            yield _row(_cells(entry, results, task, with_size=len(sizes) > 1))
    yield from _notes([entry for entry in models if _is_far(entry)])


def _notes(models: list[ModelEntry]) -> Iterator[str]:
    """Say once for all models of a kind where our count is far from what is published, and why."""
    named: dict[str, list[str]] = {}
    for entry in models:
        published, counted = entry.metadata["Published FLOPs (G)"], entry.metadata["FLOPs"] / 1e9
        note = entry.metadata.get("FLOPs Note", "we do not know why")
        named.setdefault(f"published {published} G, counted {counted:.1f} G: {note}.", []).append(f"`{entry.name}`")
    for text, names in named.items():
        yield f"\nFLOPs of {', '.join(names)}: {text}"


def _grouped(entry: ModelEntry) -> list[list[ModelResult]]:
    """Return the results in groups of one measurer and setting, a row each; that of the config itself first."""
    groups: dict[tuple[str, str], list[ModelResult]] = {}
    for result in sorted(entry.results, key=lambda result: result.setting or ""):
        groups.setdefault((result.source, result.setting or ""), []).append(result)
    return list(groups.values()) or [[]]


def _cells(entry: ModelEntry, results: list[ModelResult], task: str, with_size: bool) -> list[str]:
    values = {name: value for result in results for name, value in result.metrics.items()}
    who = WHO[results[0].source] if results else "-"
    files = {"": entry.weights, " (converted)": entry.converted_weights}
    if results and results[0].setting:
        who += f", {results[0].setting}"
        files = {}  # those of the metafile belong to the config as it stands
    return [
        f"[{entry.name}]({entry.config.relative_to(CONFIGS).as_posix()})",
        _count(entry, "Parameters", "M", 1e6),
        _count(entry, "FLOPs", "G", 1e9) + (f" at {entry.metadata['Input Size']}" if with_size else ""),
        *(str(values.get(name, "-")) for name in METRICS[task]),
        who,
        ", ".join(f"[{_file_name(url)}]({url}){note}" for note, url in files.items() if url) or "-",
    ]


def _file_name(url: str) -> str:
    """Return what the file of an address is called on the disk, so that a search on the page finds it."""
    return PurePosixPath(unquote(urlsplit(url).path)).name


def _count(entry: ModelEntry, what: str, unit: str, size: float) -> str:
    published = entry.metadata.get(f"Published {what} ({unit})")
    counted = f"{entry.metadata[what] / size:.1f} {unit}"
    return counted if published is None else f"{counted} ({published})"


def _is_far(entry: ModelEntry) -> bool:
    published = entry.metadata.get("Published FLOPs (G)")
    if published is None:
        return False
    # A number of two digits is rounded by more than that at times.
    rounded_by = 0.5 * 10 ** -len(f"{published:g}".partition(".")[2])
    return abs(entry.metadata["FLOPs"] / 1e9 - published) > max(FAR * published, rounded_by)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_tables(text: str) -> str:
    """Return the text of the README with the tables between its markers renewed.

    Raises:
        ConfigError: If a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{README}: found no line {(BEGIN if not begin else END)!r}, expected both. Put it back.")
    return f"{before}{begin}\n\n{model_tables()}\n\n{end}{after}"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the tables are out of date")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    renewed = with_tables(text)
    if renewed == text:
        return
    if args.check:
        sys.exit(
            f"error: {README}: the tables are not those of the metafiles. Run python scripts/make_model_tables.py."
        )
    README.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except MMVMambaError as error:
        sys.exit(f"error: {error}")
