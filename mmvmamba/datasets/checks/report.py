"""All findings of a check in one place: the first of each kind, the counts, as text and as JSON."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmvmamba.datasets.checks.kinds import KINDS, Level
from mmvmamba.errors import DataError

#: Findings of each kind that are written out; the rest is counted.
EXAMPLES = 20
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxother, _SHORT.maxlong = 120, 8, 8, 120, 40


def short(value: object) -> str:
    """Return a value from a file as text of one line, not too long, that any terminal can print."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """Return text with control characters and what is no Unicode text escaped, as file names may have them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Example:
    """One finding that is written out: the file, the place within it, and what was found and expected."""

    file: str
    place: str
    text: str

    def line(self) -> str:
        """Return the finding as one line."""
        return printable(": ".join(filter(None, (self.file, self.place, self.text))))


@dataclass
class Report:
    """Collects findings.

    Attributes:
        counts: How often each kind was found.
        examples: The first ``EXAMPLES`` of each kind.
        checked: What was looked at: one dict of names to numbers or texts for each data set.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    checked: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, file: str | Path, place: str, text: str) -> None:
        """Add a finding of one of ``KINDS``."""
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(Example(str(file), place, text))

    def number(self, level: Level) -> int:
        """Return how many findings are of a level."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].level is level)

    @property
    def errors(self) -> int:
        """The number of errors."""
        return self.number(Level.ERROR)

    @property
    def warnings(self) -> int:
        """The number of warnings."""
        return self.number(Level.WARNING)

    def errors_in_words(self) -> str:
        """Return the number of errors for a sentence."""
        return f"{self.errors} error" + ("s" if self.errors != 1 else "")

    def warning_lines(self) -> list[str]:
        """Return the warnings, a line each, the same text of several files once."""
        return [
            f"{name}: {printable(text)}. {KINDS[name].cure}"
            for name in self.kinds()
            if KINDS[name].level is Level.WARNING
            for text in dict.fromkeys(example.text for example in self.examples[name])
        ]

    def kinds(self) -> list[str]:
        """Return the kinds that were found, errors first."""
        return sorted(self.counts, key=lambda kind: (KINDS[kind].level is not Level.ERROR, list(KINDS).index(kind)))

    def text(self) -> str:
        """Return the report for people."""
        lines = []
        for name in self.kinds():
            kind, examples = KINDS[name], self.examples[name]
            lines.append(f"{kind.level.value}: {name}, {self.counts[name]} times: {kind.meaning}. {kind.cure}")
            lines += [f"    {example.line()}" for example in examples]
            if self.counts[name] > len(examples):
                lines.append(f"    ... and {self.counts[name] - len(examples)} more")
        for facts in self.checked:
            lines.append("checked: " + printable(", ".join(f"{name} {value}" for name, value in facts.items())))
        lines.append(f"errors: {self.errors}, warnings: {self.warnings}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        found = {
            name: {
                "level": KINDS[name].level.value,
                "count": self.counts[name],
                "meaning": KINDS[name].meaning,
                "cure": KINDS[name].cure,
                "examples": [vars(example) for example in self.examples[name]],
            }
            for name in self.kinds()
        }
        return {"errors": self.errors, "warnings": self.warnings, "found": found, "checked": self.checked}

    def write(self, path: str | Path) -> None:
        """Write the report as JSON.

        Raises:
            DataError: If the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise DataError(f"report: {str(path)!r} cannot be written ({error}). Name a file that can be.") from error

    def raise_for_errors(self) -> None:
        """Raise the whole report if it holds an error.

        Raises:
            DataError: With the text of the report.
        """
        if self.errors:
            raise DataError(f"the data set has {self.errors_in_words()}:\n{self.text()}")
