"""The text of a config inside a checkpoint: kept as text, never executed, and refused if it is more than settings.

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
#: As ``Config.pretty_text`` writes settings.
_CALLS = ("dict", "list", "set", "tuple")
_NAMES = ("inf", "nan")
_HARMLESS = (
    *(ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.keyword, ast.expr_context),
    *(ast.UnaryOp, ast.USub, ast.UAdd),
)
_MAX_CHARACTERS = 4 << 20


def take_config_text(content: dict[str, Any], name: str) -> None:
    """Move the text of a config from the places where mmengine would run it to ``content["config_text"]``.

    Args:
        content: The content of a checkpoint, changed in place.
        name: What to call the file in messages.

    Raises:
        UnsafeCheckpoint: If such a text does more than assign settings, or is no text.
    """
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
        _check(text, where, name)
        content.setdefault("config_text", text)
    text = content.get("config_text", "")
    if not isinstance(text, str):
        raise UnsafeCheckpoint(f"checkpoint {name}: config_text is a {type(text).__name__}, expected text. Remove it.")
    _check(text, "config_text", name)


def _take(content: dict[str, Any], place: tuple[str, ...]) -> Any:
    inner: Any = content
    for key in place[:-1]:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner.pop(place[-1], None) if isinstance(inner, dict) else None


def _check(text: str, where: str, name: str) -> None:
    problem = problem_with(text)
    if problem:
        raise UnsafeCheckpoint(
            f"checkpoint {name}: the text under {where} {problem}, expected assignments of plain settings; OpenMMLab "
            "would run it as a program. Nothing of it was run. Load it on a machine you trust and save it without."
        )


def problem_with(text: str) -> str | None:
    """Return why a text is more than settings, or None: assignments of literals and calls of dict, list, set, tuple.

    The text is parsed, never compiled or run.
    """
    if len(text) > _MAX_CHARACTERS:
        return f"has {len(text)} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in strings: not ours to report
            body = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return f"is no Python ({type(error).__name__})"
    for statement in body:
        if not isinstance(statement, ast.Assign) or not all(isinstance(n, ast.Name) for n in statement.targets):
            return f"holds {_shown(statement)} in line {statement.lineno}"
        for node in ast.walk(statement.value):
            if not _is_harmless(node):
                return f"holds {_shown(node)} in line {statement.lineno}"
    return None


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _CALLS
    if isinstance(node, ast.Name):
        return node.id in (*_CALLS, *_NAMES)
    return isinstance(node, _HARMLESS)


def _shown(node: ast.AST) -> str:
    kind = {"Call": "a call", "Import": "an import", "ImportFrom": "an import", "Expr": "an expression"}
    return kind.get(type(node).__name__, f"a Python {type(node).__name__}")
