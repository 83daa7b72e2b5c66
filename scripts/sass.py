"""Read NVIDIA machine code as cuobjdump prints it: instructions, loops, and how many instructions a loop has.

A loop here is a natural loop of the control-flow graph, not a stretch of addresses: the compiler moves rare blocks
behind the end of a kernel, and a branch back from there is no loop.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

EXP2 = "MUFU.EX2"

_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_ADDRESS = re.compile(r"(?:^|[\s,(`])(?:0x)([0-9a-f]+)\)?\s*$")
_BARRIER = re.compile(r"\bB\d+\b")


class SassError(ValueError):
    """The machine code is not what the caller takes it for."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it is, its guard such as ``@!P0`` or nothing, its name and its operands as printed."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address a branch, call or BSSY names, None for all others."""
        if self.name not in ("BRA", "BSSY", "CALL", "JMP"):
            return None
        found = _ADDRESS.search(self.operands)
        return None if found is None else int(found[1], 16)

    @property
    def conditional(self) -> bool:
        """Whether the next instruction may follow a branch: it has a guard, or an operand before its target."""
        return bool(self.guard) or "," in self.operands


@dataclass(frozen=True)
class Loop:
    """A natural loop: the addresses of its first instruction and of all of its instructions."""

    header: int
    body: frozenset[int]


def parse(text: str) -> dict[str, list[Instruction]]:
    """Return the instructions of every function in the output of ``cuobjdump -sass``, by mangled name."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            current = functions.setdefault(found[1], [])
        elif current is not None and (found := _LINE.match(line)):
            current.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4].strip()))
    return functions


def subroutine_calls(code: Sequence[Instruction]) -> set[int]:
    """Return where a function calls code that returns.

    Other calls are mere branches, with which the compiler ends loops for sm_80: from their targets no RET is reached.
    """
    following = _edges(code, frozenset())
    returns = {one.address for one in code if one.name == "RET"}
    calls = set()
    for one in code:
        if one.name == "CALL" and (one.target is None or returns & _reached(one.target, following)):
            calls.add(one.address)
    return calls


def _reached(start: int, after: Mapping[int, Iterable[int]]) -> set[int]:
    """Return all that can be reached from a start, itself included."""
    reached, todo = {start}, [start]
    while todo:
        for successor in after.get(todo.pop(), ()):
            if successor not in reached:
                reached.add(successor)
                todo.append(successor)
    return reached


def _successors(code: Sequence[Instruction]) -> dict[int, list[int]]:
    """Return where each instruction may be followed, by address; subroutines are passed over."""
    branches = {one.address for one in code if one.name == "CALL"} - subroutine_calls(code)
    return _edges(code, branches)


def _edges(code: Sequence[Instruction], calls_that_branch: Set[int]) -> dict[int, list[int]]:
    targets: dict[str, int] = {}  # of the last BSSY of each barrier, in the order of addresses
    following: dict[int, list[int]] = {}
    for index, one in enumerate(code):
        after = [code[index + 1].address] if index + 1 < len(code) else []
        if one.name == "BSSY" and one.target is not None and (barrier := _BARRIER.search(one.operands)):
            targets[barrier[0]] = one.target
        if one.opcode in ("BRA.DIV", "BRA.CONV"):
            # Lanes of a warp that came apart take a detour over code that waits for them; those of a loop run together.
            after = after if one.opcode == "BRA.DIV" or one.target is None else [one.target]
        elif one.name in ("BRA", "JMP") and one.target is not None:
            after = [one.target, *(after if one.conditional else [])]
        elif one.address in calls_that_branch and one.target is not None:
            after = [one.target, *(after if one.guard else [])]
        elif one.name in ("EXIT", "RET", "BRX", "JMX") and not one.guard:
            after = []
        elif one.name == "BSYNC" and (barrier := _BARRIER.search(one.operands)) and barrier[0] in targets:
            # Lanes meet here and go on where the BSSY said.
            after = [targets[barrier[0]], *(after if one.guard else [])]
        following[one.address] = after
    return {address: [a for a in after if a in following] for address, after in following.items()}


def _blocks(code: Sequence[Instruction], following: Mapping[int, list[int]]) -> dict[int, list[int]]:
    """Cut the code into basic blocks: first address -> all addresses."""
    leaders = {code[0].address}
    for index, one in enumerate(code):
        after = following[one.address]
        following_line = code[index + 1].address if index + 1 < len(code) else None
        if after != [following_line]:
            leaders.update(after)
            if following_line is not None:
                leaders.add(following_line)
    blocks: dict[int, list[int]] = {}
    for one in code:
        if one.address in leaders:
            current = blocks.setdefault(one.address, [])
        current.append(one.address)
    return blocks


def _dominators(start: int, after: Mapping[int, list[int]]) -> dict[int, set[int]]:
    """Return, for every block that can be reached, the blocks that every way to it goes through."""
    reached = _reached(start, after)
    before: dict[int, list[int]] = {}
    for block in reached:
        for successor in after[block]:
            before.setdefault(successor, []).append(block)
    dominators = {block: set(reached) for block in reached}
    dominators[start] = {start}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {start}):
            new = {block}.union(set.intersection(*(dominators[p] for p in before[block])))
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Return the natural loops of a function, in the order of their headers; those with one header are one loop."""
    if not code:
        return []
    following = _successors(code)
    blocks = _blocks(code, following)
    after = {first: following[addresses[-1]] for first, addresses in blocks.items()}
    dominators = _dominators(code[0].address, after)
    before: dict[int, list[int]] = {}
    for block in dominators:
        for successor in after[block]:
            before.setdefault(successor, []).append(block)
    bodies: dict[int, set[int]] = {}
    for block, over in dominators.items():
        for header in after[block]:
            if header not in over:
                continue
            body = bodies.setdefault(header, {header})
            todo = [block]
            while todo:
                inner = todo.pop()
                if inner not in body:
                    body.add(inner)
                    todo += before.get(inner, [])
    return [
        Loop(header, frozenset(address for block in body for address in blocks[block]))
        for header, body in sorted(bodies.items())
    ]


def nested(loop: Loop, loops: Iterable[Loop]) -> list[Loop]:
    """Return the loops inside another."""
    return [other for other in loops if other.body < loop.body]


def own_exponentials(loop: Loop, loops: Sequence[Loop], code: Sequence[Instruction]) -> int:
    """Count the MUFU.EX2 of a loop that are in none of the loops inside it."""
    inner = {address for other in nested(loop, loops) for address in other.body}
    return sum(one.opcode == EXP2 and one.address in loop.body - inner for one in code)


def tile_loop(code: Sequence[Instruction]) -> tuple[Loop, list[Loop]]:
    """Find the loop in which a scan kernel spends its time, and the loops inside it.

    It is the smallest of those with the most MUFU.EX2 of their own.

    Raises:
        SassError: There is none.
    """
    loops = find_loops(code)
    counts = {loop: own_exponentials(loop, loops, code) for loop in loops}
    if not any(counts.values()):
        raise SassError(f"found no loop with {EXP2} among {len(loops)} loops, expected the tile loop of a scan kernel")
    hottest = min(loops, key=lambda loop: (-counts[loop], len(loop.body)))
    return hottest, nested(hottest, loops)


@dataclass(frozen=True)
class InnerLoop:
    """How often a loop inside the tile loop turns, on the average; known by the instructions it has.

    Attributes:
        what: What it does.
        own: Names of instructions it has outside the loops inside it.
        turns: How often.
        within: Names of instructions it has, loops inside it included.
        without: Names of instructions it does not have, loops inside it included.
    """

    what: str
    own: tuple[str, ...]
    turns: float
    within: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def is_it(self, loop: Loop, loops: Sequence[Loop], code: Sequence[Instruction]) -> bool:
        """Return whether a loop is of this kind."""
        inner = {address for other in nested(loop, loops) for address in other.body}
        everything = {one.name for one in code if one.address in loop.body}
        own = {one.name for one in code if one.address in loop.body - inner}
        return own >= {*self.own} and everything >= {*self.within} and everything.isdisjoint(self.without)


def turns_of(inside: Sequence[Loop], code: Sequence[Instruction], declared: Sequence[InnerLoop]) -> list[float]:
    """Return how often each loop turns by the first declaration that fits it.

    Raises:
        SassError: None fits one of them.
    """
    turns = []
    for loop in inside:
        fitting = [kind.turns for kind in declared if kind.is_it(loop, inside, code)]
        if not fitting:
            raise SassError(
                f"the tile loop holds a loop that is not declared ({describe(loop, code)}). Unroll it, or declare how "
                "often it turns in KERNELS of scripts/check_cuda.py."
            )
        turns.append(fitting[0])
    return turns


def describe(loop: Loop, code: Sequence[Instruction]) -> str:
    """Return where a loop is and what is in it."""
    names = Counter(one.name for one in code if one.address in loop.body)
    listed = ", ".join(f"{n} {name}" for name, n in names.most_common(8))
    return f"at {loop.header:#x}, {len(loop.body)} instructions: {listed}"


def count(code: Sequence[Instruction], loop: Loop, inside: Sequence[Loop], turns: Sequence[float]) -> dict[str, float]:
    """Count the instructions of one turn of a loop by opcode.

    Args:
        code: The function.
        loop: A loop of it.
        inside: The loops in it.
        turns: How often each of them turns; those of loops inside each other multiply.
    """
    counts: dict[str, float] = {}
    for one in code:
        if one.address in loop.body:
            times = 1.0
            for inner, often in zip(inside, turns, strict=True):
                times *= often if one.address in inner.body else 1.0
            counts[one.opcode] = counts.get(one.opcode, 0.0) + times
    return counts


def total(counts: Mapping[str, float], *names: str) -> float:
    """Add up the opcodes with these names, suffixes or not; all of them without names."""
    return sum(n for opcode, n in counts.items() if not names or opcode.split(".")[0] in names)
