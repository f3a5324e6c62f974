"""The text of a compiled XLA program, parsed into computations of instructions.

%fused (p: f32[8]) -> f32[8] {                  a computation: its parameters, instructions and
  %p = f32[8]{0} parameter(0)                   a root, whose value it returns
  ROOT %n = f32[8]{0} negate(%p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)            %name = type opcode(operands), attributes
  ROOT %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
}
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Array(NamedTuple):
    """Bytes of an array, and how many of them lie in HBM: all or none."""

    size: float
    hbm: float


@functools.cache
def arrays_of(type_: str) -> list[Array]:
    """The arrays of a type, in order.

    >>> arrays_of("(f32[2,3]{1,0:T(8,128)}, (bf16[4]{0:S(1)}, s4[3]), token[])")
    [Array(size=24.0, hbm=24.0), Array(size=8.0, hbm=0.0), Array(size=1.5, hbm=1.5), \
Array(size=0.0, hbm=0.0)]
    """
    found = []
    for kind, shape, layout in re.findall(r"(\w+)\[([^\]]*)\]({[^}]*})?", type_):
        digits = re.search(r"\d+", kind)  # f8e4m3fn has 8 bits; token has none
        bits = int(digits[0]) if digits else 8 * (kind == "pred")
        size = math.prod(int(n.strip("<= ")) for n in shape.split(",") if n) * bits / 8
        # Memory space 0, or none, is HBM; S(1) is VMEM, others hold scalars, semaphores or are
        # the host's.
        found.append(Array(size, 0.0 if re.search(r"S\([1-9]", layout) else size))
    return found


@dataclass(eq=False)
class Instruction:
    """One line of a computation.

    >>> main = parse('''
    ... ENTRY %main (x: f32[8]) -> f32[32] {
    ...   %x = f32[8]{0} parameter(0)
    ...   %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
    ...   ROOT %d = f32[32]{0} all-gather-done(%s)
    ... }''').entry
    >>> s = main.instructions["s"]
    >>> s.opcode, s.base, [o.name for o in s.operands], [u.name for u in s.users], s.size
    ('all-gather-start', 'all-gather', ['x'], ['d'], 128.0)

    Attributes:
      operands: of the same computation.
      text: from the "(" before the operands to the end of the line.
      module: where the computations that it calls are found.
      users: the instructions that have it as an operand.
      late: continues a collective that was counted where it started (:func:`.hlo.find_late`).
      base: the opcode without "-start".
      arrays: of its type.
      size, hbm: bytes of the result, and those of them in HBM.
      target: of a custom call.
      updates: what a dynamic-update-slice or a scatter writes into its first operands.
    """

    name: str
    type: str
    opcode: str
    operands: list[Instruction]
    text: str
    module: Module = field(repr=False)
    users: list[Instruction] = field(default_factory=list, repr=False)
    late: bool = False

    def __post_init__(self) -> None:
        self.base = self.opcode.removesuffix("-start")
        self.arrays = result = arrays_of(self.type)
        # The type of a start holds the operands, the result and semaphores, but for all-reduce.
        if self.opcode not in (self.base, "all-reduce-start"):
            n = sum(len(o.arrays) for o in self.operands)
            result = result[:1] if self.base == "copy" else result[n : 2 * n]
        self.size, self.hbm = sum(a.size for a in result), sum(a.hbm for a in result)
        match = re.search(r'custom_call_target="([^"]*)"', self.text)
        self.target = match[1] if match and self.opcode == "custom-call" else ""
        self.updates = self.operands[1:2] if self.opcode == "dynamic-update-slice" else []
        if self.opcode == "scatter":  # n destinations, the indices, n updates
            self.updates = self.operands[len(self.operands) // 2 + 1 :]
        for operand in dict.fromkeys(self.operands):
            operand.users.append(self)

    def number(self, pattern: str) -> int | None:
        """The number that the first group of a pattern finds after the opcode."""
        match = re.search(pattern, self.text)
        return int(match[1]) if match else None

    def called(self, keys: str = "calls") -> list[Computation]:
        """The computations named by attributes, ``keys`` a pattern: calls=%f, branches={%f, %g}."""
        found = re.findall(rf"\b(?:{keys})=({{[^}}]*}}|%[^\s,]+)", self.text)
        names = re.findall(r"%([^\s,}]+)", " ".join(found))
        return [self.module.computations[name] for name in names]

    def source(self, *through: str) -> Instruction:
        """The instruction whose value this one hands on through opcodes such as bitcast.

        >>> main = parse('''
        ... ENTRY %main (x: f32[8]) -> f32[2,4] {
        ...   %x = f32[8]{0} parameter(0)
        ...   %c = f32[8]{0} copy(%x)
        ...   ROOT %b = f32[2,4]{1,0} bitcast(%c)
        ... }''').entry
        >>> main.root.source("bitcast").name, main.root.source("bitcast", "copy").name
        ('c', 'x')
        """
        return self.operands[0].source(*through) if self.opcode in through else self


class Computation:
    """Instructions by name, parameters by number, and the root."""

    def __init__(self, lines: list[str], module: Module) -> None:
        self.instructions: dict[str, Instruction] = {}
        self.parameters: dict[int, Instruction] = {}
        for line in lines:
            name, rest = line.strip().split(" = ", 1)
            start = re.search(r" [a-z][\w-]*\(", rest)  # no type has a space before a word
            assert start, line[:200]
            type_, opcode, text = rest[: start.start()], start[0][1:-1], rest[start.end() - 1 :]
            names = re.findall(r"%([^\s,()]+)", text[: _closing(text)])
            operands = [self.instructions[n] for n in names]  # they stand before their users
            new = Instruction(name.split("%")[1], type_, opcode, operands, text, module)
            self.instructions[new.name] = new
            if name.startswith("ROOT"):
                self.root = new
            if opcode == "parameter":
                self.parameters[int(text[1 : text.index(")")])] = new


def _closing(text: str) -> int:
    """Where the parenthesis closes with which a text begins.

    >>> _closing("((a), b), c")
    7
    """
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    raise ValueError(f"no closing parenthesis: {text[:200]}")


@dataclass
class Module:
    """The computations of a program by name; ``entry`` is the one that runs."""

    computations: dict[str, Computation] = field(default_factory=dict)
    entry: Computation = field(init=False)


def parse(text: str) -> Module:
    """Parses what ``compiled.as_text()`` returns; raises ValueError where it is no such text."""
    module, name, block = Module(), "", list[str]()
    for line in text.splitlines():
        if not name:
            if header := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
                is_entry, name = header.groups()
        elif line == "}" or line.startswith("}, execution_thread"):
            module.computations[name] = Computation(block, module)
            if is_entry:
                module.entry = module.computations[name]
            name, block = "", []
        elif re.match(r"\s+(ROOT )?%\S+ = ", line):
            block.append(line)
        else:
            block[-1] += line  # kernels have metadata with line breaks
    if not hasattr(module, "entry"):
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return module
