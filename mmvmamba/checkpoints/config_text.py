"""The text of a config inside a checkpoint: kept as text, never executed, and refused if it is clearly a program.

mmengine executes it as Python: ``Runner.resume`` the text under ``meta.config``, its inferencer the text under
``message_hub.runtime_info.cfg`` and ``meta.cfg``. So it leaves these places here, whatever it holds.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any

from mmvmamba.errors import UnsafeCheckpoint

_PLACES = (("meta", "config"), ("meta", "cfg"), ("message_hub", "runtime_info", "cfg"))
#: Calls that ``Config.pretty_text`` writes for settings.
_CALLS = ("dict", "list", "set", "tuple", "frozenset", "range", "complex", "bytes")
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_PROGRAMS = (
    *(ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Await, ast.Yield, ast.YieldFrom),
    *(ast.JoinedStr, ast.NamedExpr),
)
#: A text alone, or a file name such as ``configs/a.py``, which MMCV wrote into the first line.
_LABELS = (ast.Name, ast.Attribute, ast.BinOp, ast.operator, ast.Constant, ast.expr_context)
#: In YAML, makes Python objects of what follows.
_YAML_MARK = "!!python/"
#: A parser takes 600 times the text in memory; the longest config of MMDetection has 60 kB.
_MAX_CHARACTERS = 256_000


def take_config_text(content: dict[str, Any], name: str) -> None:
    """Move the text of a config from the places where mmengine would run it to ``content["config_text"]``.

    Args:
        content: The content of a checkpoint, changed in place.
        name: What to call the file in messages.

    Raises:
        UnsafeCheckpoint: If such a text is clearly a program, too long to be judged, or no text.
    """
    judged: set[str] = set()
    for place in _PLACES:
        text = _take(content, place)
        if text is None:
            continue
        where = ".".join(place)
        if not isinstance(text, str):
            raise UnsafeCheckpoint(
                f"checkpoint {name}: {where} is a {type(text).__name__}, expected the text of a config. Remove it and "
                "save the checkpoint again on a machine you trust."
            )
        _check(text, where, name, judged)
        content.setdefault("config_text", text)
    text = content.get("config_text", "")
    if not isinstance(text, str):
        raise UnsafeCheckpoint(f"checkpoint {name}: config_text is a {type(text).__name__}, expected text. Remove it.")
    _check(text, "config_text", name, judged)


def _take(content: dict[str, Any], place: tuple[str, ...]) -> Any:
    inner: Any = content
    for key in place[:-1]:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner.pop(place[-1], None) if isinstance(inner, dict) else None


def _check(text: str, where: str, name: str, judged: set[str]) -> None:
    if text in judged:
        return
    judged.add(text)
    problem = problem_with(text)
    if problem:
        raise UnsafeCheckpoint(
            f"checkpoint {name}: the text under {where} {problem}, expected assignments of plain settings; OpenMMLab "
            "would run it as a program. Nothing of it was run. Load it on a machine you trust and save it without."
        )


def problem_with(text: str) -> str | None:
    """Return why a text is a program rather than settings, or None.

    The text is parsed, never compiled or run. What is no Python, such as YAML or the names of classes that an older
    ``pretty_text`` wrote, is no program either, unless it asks YAML for Python objects.
    """
    if len(text) > _MAX_CHARACTERS:
        return f"has {len(text)} characters, more than the {_MAX_CHARACTERS} that are judged"
    if _YAML_MARK in text:
        return f"holds YAML's mark of Python objects, {_YAML_MARK}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in strings: not ours to report
            body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return None
    except (MemoryError, RecursionError) as error:
        return f"is nested too deep to be judged ({type(error).__name__})"
    for statement in body:
        nodes = list(ast.walk(statement))
        label = isinstance(statement, ast.Expr) and all(isinstance(node, (ast.Expr, *_LABELS)) for node in nodes)
        if not label and not isinstance(statement, _ASSIGNMENTS):
            return f"holds {_shown(statement)} in line {statement.lineno}"
        for node in nodes:
            if isinstance(node, _PROGRAMS) or (isinstance(node, ast.Call) and not _makes_settings(node)):
                return f"holds {_shown(node)} in line {statement.lineno}"
    return None


def _makes_settings(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _CALLS


def _shown(node: ast.AST) -> str:
    kind = {"Call": "a call", "Import": "an import", "ImportFrom": "an import", "Expr": "an expression"}
    return kind.get(type(node).__name__, f"a Python {type(node).__name__}")
