"""Write the pages of docs/ that are made from other files: ``python scripts/make_docs.py``.

| page | made from |
|---|---|
| docs/environment.md | the tables in the docstrings of mmvmamba/envs.py, setup.py and scripts/bootstrap.py |
| docs/model_zoo.md | the metafiles of configs/ and the archs of the backbones |
| docs/benchmarks.md | benchmarks/results/*.json |
| docs/api/*.md | the public names of the package |

With ``--check`` nothing is written; the exit status is 1 if a page is not what would be written.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the package of this checkout, whether or not one is installed

import torch  # noqa: E402
from make_model_tables import model_tables  # noqa: E402

from benchmarks.table import render  # noqa: E402
from mmvmamba.errors import ConfigError, MMVMambaError  # noqa: E402
from mmvmamba.models import FAMILIES  # noqa: E402
from mmvmamba.models.backbones.base import BaseBackbone  # noqa: E402

DOCS = ROOT / "docs"
NOTE = "<!-- written by scripts/make_docs.py from {}: change that, not this page -->\n"

_ENVIRONMENT = (
    ("When the package runs", "mmvmamba/envs.py", "Read by the installed package, in `mmvmamba/envs.py` alone."),
    (
        "When the extension is built",
        "setup.py",
        "Read by `pip install .`, `pip wheel .` and `python setup.py build_ext --inplace`. `pip install -v` shows what "
        "was decided.",
    ),
    (
        "When `make` sets up a checkout",
        "scripts/bootstrap.py",
        "Read by `make install` and, through it, by every other target. `TEST_JOBS=4 make test` runs four processes.",
    ),
)

#: Page of the API -> title, the modules whose ``__all__`` it documents, the packages whose every module it documents.
_API: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "ops": ("Operators", ("mmvmamba.ops",), ()),
    "models": ("Networks", ("mmvmamba.models", "mmvmamba.models.layers"), ()),
    "checkpoints": ("Checkpoints and converters", ("mmvmamba.checkpoints", "mmvmamba.converters"), ()),
    "engine": ("Hooks and optimizers", ("mmvmamba.engine",), ()),
    "apis": ("What the tools do", ("mmvmamba.apis",), ("mmvmamba.apis.networks", "mmvmamba.apis.model_index")),
    "analysis": ("Measuring and looking", (), ("mmvmamba.analysis",)),
    "deployment": ("Export", (), ("mmvmamba.deployment",)),
    "datasets": ("Data sets", ("mmvmamba.datasets",), ()),
    "errors": ("Errors and environment", (), ("mmvmamba.errors", "mmvmamba.envs", "mmvmamba.optional")),
}


def pages() -> dict[Path, str]:
    """Return every generated page by its path."""
    made = {
        DOCS / "environment.md": environment_page(),
        DOCS / "model_zoo.md": model_zoo_page(),
        DOCS / "benchmarks.md": benchmarks_page(),
    }
    made |= {DOCS / "api" / f"{name}.md": text for name, text in api_pages().items()}
    return made


def environment_page() -> str:
    """Return the page of environment variables: the tables of three docstrings."""
    parts = [
        NOTE.format("mmvmamba/envs.py, setup.py and scripts/bootstrap.py"),
        "# Environment variables\n",
        "All that are read, each in one place. Variables of PyTorch and of torchrun that only pass through are not "
        "listed; the backends they choose between are explained in [backends.md](backends.md).\n",
    ]
    for title, path, text in _ENVIRONMENT:
        parts += [f"## {title}\n", f"{text}\n", f"{docstring_table(ROOT / path)}\n"]
    return "\n".join(parts)


def docstring_table(path: Path) -> str:
    """Return the one table in the docstring of a module, which is not imported, in Markdown.

    Raises:
        ValueError: If there is no such table.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    if len(rows) < 3 or "---" not in rows[1]:
        raise ValueError(f"{path}: found no table in the docstring of the module, expected one. Write it as '| ... |'.")
    return "\n".join(rows).replace("``", "`")


def model_zoo_page() -> str:
    """Return the page of models: families with their archs, then what configs/README.md says of every config."""
    head, _, configs = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").partition("\n## ")
    if model_tables() not in configs:
        raise ConfigError(
            "configs/README.md has other tables than the metafiles. Run python scripts/make_model_tables.py first."
        )
    intro = head.partition("\n")[2].strip()
    configs = re.sub(r"<!-- written by .*? -->\n*", "", configs)
    return "\n".join(
        [
            NOTE.format("configs/README.md, the metafiles of configs/ and the archs of the backbones"),
            "# Model zoo\n",
            "The name of a config without its ending is what `demo/image_demo.py`, `mmvmamba.apis.inferencer` and the "
            "tools under `tools/analysis_tools` and `tools/deployment` take for a model; `tools/train.py` and "
            '`tools/test.py` take the path of the file. What is marked "upstream" was published by the authors; **none '
            "of these models was trained by us**.\n",
            "## Families and archs\n",
            "\n".join(_arch_rows()),
            "\n## The folder configs/\n",
            _moved(intro),
            "\n## " + _moved(configs),
        ]
    )


def _moved(text: str) -> str:
    """Return text of configs/ with its links as they must be in docs/."""
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](../configs/", text)
    return text.replace("](../docs/", "](")


def _arch_rows() -> Iterator[str]:
    """Yield the table of all archs: built without memory, so that channels and strides are those of the code."""
    yield "| `type` | `arch` | channels of the maps | strides |"
    yield "|---|---|---|---|"
    for name, family in FAMILIES.items():
        for arch in importlib.import_module(f"mmvmamba.models.backbones.{name}").ARCHS:
            build: Callable[..., BaseBackbone] = family
            with torch.device("meta"):
                backbone = build(arch)
            maps = sorted(backbone.out_indices)
            channels, strides = (
                ", ".join(str(values[i]) for i in maps) for values in (backbone.stage_channels, backbone.stage_strides)
            )
            yield f"| `mmvmamba.{family.__name__}` | `{arch}` | {channels} | {strides} |"


def benchmarks_page() -> str:
    """Return all recorded results of the benchmarks, the newest first."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"), reverse=True)
    parts = [
        NOTE.format("benchmarks/results/"),
        "# Benchmarks\n",
        "Every recorded result as it was printed, the newest first; how each is measured stands in "
        "`benchmarks/README.md`, what follows from them in [cpu_speed.md](cpu_speed.md) and "
        "[families.md](families.md#size-accuracy-speed). All are of one CPU: nothing here was timed on a GPU yet "
        "([gpu_speed.md](gpu_speed.md)). Compare ratios inside one table; the machine was shared, and absolute times "
        "of two runs say little.\n",
        "| file | benchmark | device | threads | date | commit |",
        "|---|---|---|---|---|---|",
    ]
    sections = []
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = content["environment"]
        title = path.stem.replace("_", " ")
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        cells = [f"[{title}](#{anchor})", content["benchmark"], facts.get("device", "-")]
        cells += [str(facts.get(key, "-"))[:10] for key in ("threads", "date", "commit")]
        parts.append("| " + " | ".join(cells) + " |")
        sections += [f"\n## {title}\n", f"`benchmarks/results/{path.name}`\n", render(content)]
    return "\n".join([*parts, *sections, ""])


def api_pages() -> dict[str, str]:
    """Return the pages of the API by name, and the page that leads to them."""
    made, entries = {}, []
    for page, (title, listed, walked) in _API.items():
        sections = [_listed(importlib.import_module(name)) for name in listed if _exists(name)]
        sections += [_walked(module) for name in walked if _exists(name) for module in _modules(name)]
        text = "\n".join(section for section in sections if section)
        if text:
            made[page] = f"{NOTE.format('the public names of the package')}\n# {title}\n\n{text}"
            entries.append(page)
    toc = "\n".join(["```{toctree}", ":maxdepth: 1", "", *entries, "```", ""])
    made["index"] = f"{NOTE.format('the public names of the package')}\n# API reference\n\n{_API_INTRO}\n\n{toc}"
    return made


_API_INTRO = (
    "What the package exports, from the docstrings. Shapes are written in lower-case words: (b, h, w, d) is batch, "
    "height, width, channels. Every error is a class of `mmvmamba.errors`."
)


def _exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _modules(name: str) -> list[ModuleType]:
    """Return a module, or all modules of a package with itself, without those whose name begins with ``_``."""
    module = importlib.import_module(name)
    inside = [info.name for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}.")]
    public = [name for name in inside if not any(word.startswith("_") for word in name.split("."))]
    return [module, *map(importlib.import_module, public)]


def _listed(module: ModuleType) -> str:
    """Document what a module lists in ``__all__``, wherever it is defined."""
    return _section(module, sorted(set(module.__all__)))


def _walked(module: ModuleType) -> str:
    """Document the public names that a module defines itself."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    return _section(module, names)


def _section(module: ModuleType, names: list[str]) -> str:
    """Return the section of one module for Sphinx' autodoc; empty if nothing of it has a docstring."""
    lines = []
    for name in names:
        value = getattr(module, name)
        if inspect.ismodule(value) or not inspect.getdoc(value):
            continue
        if not inspect.isclass(value) and not callable(value):
            continue  # a table: its values are in the code, its docstring that of dict
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        lines += [f".. {kind}:: {module.__name__}.{name}", ""]
    if not lines:
        return ""
    first = (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
    return "\n".join([f"## {module.__name__}\n", f"{first}\n", "```{eval-rst}", *lines, "```", ""])


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    args = parser.parse_args()
    made = pages()
    old = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    stray = [path for path in sorted((DOCS / "api").glob("*.md")) if path not in made]
    if args.check and (old or stray):
        names = ", ".join(str(path.relative_to(ROOT)) for path in old + stray)
        sys.exit(f"error: not what their sources say: {names}. Run python scripts/make_docs.py.")
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    for path in stray:
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except MMVMambaError as error:
        sys.exit(f"error: {error}")
