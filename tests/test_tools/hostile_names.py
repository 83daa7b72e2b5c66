"""Twenty names that harm where a script or tool lets a shell, ``eval`` or an option parser have them (F2)."""

from __future__ import annotations

CANARY = "canary"

HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    f"a;touch {CANARY}",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"a\ntouch {CANARY}\n",
    f"a && touch {CANARY}",
    f"a | tee {CANARY}",
    f"a > {CANARY}",
    "-rf",
    "--help",
    "--",
    "*",
    "{a,b}",
    "~/x",
    "$HOME/${PATH}",
    "../../x",
    "\u65e5\u672c\u8a9e \u202e\u00e9\t\\",
    f"x[$(touch {CANARY})]",
]
