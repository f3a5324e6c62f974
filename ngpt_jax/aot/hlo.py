"""Figures read from the text of a compiled XLA program, each loop counted as often as it runs.

    analyze(jax.jit(f).lower(...).compile().as_text())

XLA's own cost analysis counts the body of a loop once. Sizes are those of the arrays, without
the padding of tiled layouts. All branches of a conditional count, as if each were taken.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

COLLECTIVES = frozenset(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute "
    "collective-broadcast".split()
)
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = ("dynamic-update-slice", "scatter")
SAME_VALUE = ("bitcast", "copy", "copy-start", "copy-done", "convert", "reshape")
# These move nothing: names, values of no size, frames of computations counted by themselves.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id "
    "replica-id add-dependency domain while call conditional async "
    "AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound".split()
)


@dataclass(frozen=True)
class Collective:
    instructions: int  # in the text
    count: int  # executions
    bytes: float  # of operands or result, the larger, on one device over all executions


@dataclass(frozen=True)
class Program:
    collectives: dict[str, Collective]  # by kind: "all-gather" etc.; "send" goes to other slices
    bytes_accessed: float  # read from and written to HBM by one device
    custom_calls: dict[str, int]  # instructions in the text by target
    kernels: dict[str, int]  # instructions in the text by name of the Pallas kernel
    unknown_loops: tuple[str, ...]  # the text does not tell their trip count: counted once
    traffic: dict[str, tuple[int, float]]  # executions and bytes_accessed by instruction


@functools.cache
def _arrays(text: str) -> list[tuple[float, float]]:
    """Bytes of each array of a type, and how many of them lie in HBM."""
    found = []
    for kind, shape, layout in re.findall(r"(\w+)\[([^\]]*)\]({[^}]*})?", text):
        digits = re.search(r"\d+", kind)  # f8e4m3fn has 8 bits; token has none
        bits = int(digits[0]) if digits else 8 * (kind == "pred")
        size = math.prod(int(n.strip("<= ")) for n in shape.split(",") if n) * bits / 8
        # S(0) or nothing is HBM, S(1) VMEM, others hold scalars, semaphores or are the host's.
        found.append((size, 0.0 if re.search(r"S\([1-9]", layout) else size))
    return found


@dataclass(eq=False)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[_Instruction]
    text: str  # from "(" of the operands on
    users: list[_Instruction] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base = self.opcode.removesuffix("-start")
        self.arrays = result = _arrays(self.type)
        if self.opcode not in (self.base, "all-reduce-start"):  # also gives operands, semaphores
            n = sum(len(o.arrays) for o in self.operands)
            result = result[:1] if self.base == "copy" else result[n : 2 * n]
        self.size, self.hbm = (sum(column) for column in zip((0.0, 0.0), *result))
        match = re.search(r'custom_call_target="([^"]*)"', self.text)
        self.target = match[1] if match and self.opcode == "custom-call" else ""
        count = len(self.operands)  # of them the updates, and before them as many destinations
        self.updates = self.operands[1:2] if self.opcode == UPDATES[0] else []
        if self.opcode == "scatter":
            self.updates = self.operands[count // 2 + 1 :]
        for operand in dict.fromkeys(self.operands):
            operand.users.append(self)

    def number(self, pattern: str) -> int | None:
        match = re.search(pattern, self.text)
        return int(match[1]) if match else None

    def source(self, *through: str) -> _Instruction:
        """The instruction whose value this hands on."""
        return self.operands[0].source(*through) if self.opcode in through else self

    def lands(self, root: _Instruction) -> bool:
        """Whether it is all or a part of what `root` gives: updates are then made in place."""
        return self is root or any(
            u.lands(root)
            for u in self.users
            if u.opcode in ("bitcast", "tuple") or (u.updates and u.operands[0] is self)
        )

    def sliced(self) -> bool:
        """Whether a fusion scatters what it reduced: all-reduce-scatter of TPU programs."""
        return any(
            self is u.operands[0] and (u.opcode == "dynamic-slice" or u.sliced())
            for u in self.users
            if u.opcode in ("dynamic-slice", "get-tuple-element", *SAME_VALUE)
        )


class _Computation:
    def __init__(self, lines: list[str]) -> None:
        self.parameters: dict[int, _Instruction] = {}
        self.instructions: dict[str, _Instruction] = {}
        for line in lines:
            name, rest = line.strip().split(" = ", 1)
            start = re.compile(r" [a-z][\w-]*\(").search(rest)  # no type has a space before a word
            assert start, line[:200]
            depth, end = 0, start.end() - 1
            for end in (m.start() for m in re.compile(r"[()]").finditer(rest, start.end() - 1)):
                depth += 1 if rest[end] == "(" else -1
                if depth == 0:
                    break
            names = re.findall(r"%([^\s,()]+)", rest[start.end() : end])
            operands = [self.instructions[n] for n in names]  # they stand before their users
            head, tail = rest[: start.start()], rest[start.end() - 1 :]
            new = _Instruction(name.split("%")[1], head, start[0][1:-1], operands, tail)
            self.instructions[new.name] = new
            if name.startswith("ROOT"):
                self.root = new
            if new.opcode == "parameter":
                self.parameters[int(tail[1 : tail.index(")")])] = new


class _Analysis:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, _Computation] = {}
        name, entry, block = "", "", list[str]()
        for line in text.splitlines():
            if not name:
                if header := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
                    name, entry = header[2], header[2] if header[1] else entry
            elif line == "}" or line.startswith("}, execution_thread"):
                self.computations[name] = _Computation(block)
                name, block = "", []
            elif re.match(r"\s+(ROOT )?%\S+ = ", line):
                block.append(line)
            else:
                block[-1] += line  # kernels have metadata with line breaks
        if not entry:
            raise ValueError("no ENTRY computation: not the text of a compiled program")
        self.found: dict[str, set[str]] = defaultdict(set)
        self.collectives: dict[str, Counter[float]] = defaultdict(Counter)  # executions by bytes
        self.traffic: dict[str, Counter[float]] = defaultdict(Counter)
        self.unknown: dict[str, None] = {}
        self.late = self._late()
        self._visit(self.computations[entry], 1)

    def _called(self, i: _Instruction, keys: str = "calls") -> list[_Computation]:
        found = re.findall(rf"\b(?:{keys})=({{[^}}]*}}|%[^\s,]+)", i.text)
        return [self.computations[c] for c in re.findall(r"%([^\s,}]+)", " ".join(found))]

    def _late(self) -> set[_Instruction]:
        """What only moves on or ends a collective that was counted where it started.

        TPU programs hold one all-gather three times, under one channel: in a fusion with
        AsyncCollectiveStart, in matmuls that move it along, in a fusion with AsyncCollectiveDone.
        """
        begun, later = set(), dict[_Instruction, tuple[str, int | None]]()
        for c in self.computations.values():
            starts = any(i.target == "AsyncCollectiveStart" for i in c.instructions.values())
            waits = any("S(2)" in p.type for p in c.parameters.values())  # for a semaphore
            for i in c.instructions.values():
                key = (i.base, i.number(r"channel_id=(\d+)"))  # in shard_map all have channel 1
                if i.base in COLLECTIVES and starts:
                    begun.add(key)
                elif i.base in COLLECTIVES and waits:
                    later[i] = key
        return {i for i, key in later.items() if key in begun}

    def _visit(self, c: _Computation, times: int, fused: bool = False) -> None:
        for i in c.instructions.values():
            if i.opcode == "while":
                trips = self._trips(i)
                self._visit(self._called(i, "body")[0], times * trips)
                self._visit(self._called(i, "condition")[0], times * (trips + 1))
            elif i.base in ("call", "async", "conditional", "fusion"):
                keys = "branch_computations|true_computation|false_computation|calls|to_apply"
                for called in self._called(i, keys):
                    self._visit(called, times, fused or i.opcode == "fusion")
            elif i.base in COLLECTIVES and i not in self.late:
                kind = (
                    "reduce-scatter" if fused and i.base == "all-reduce" and i.sliced() else i.base
                )
                self.found[kind].add(i.name)
                self.collectives[kind][max(sum(o.size for o in i.operands), i.size)] += times
            elif i.opcode == "send":
                self.found["send"].add(i.name)
                self.collectives["send"][sum(o.size for o in i.operands)] += times
            if not fused and (moved := self._bytes(i)):
                self.traffic[i.name][moved] += times

    def _bytes(self, i: _Instruction) -> float:
        """HBM bytes of one execution."""
        if FREE & {i.base, i.target} or i.opcode.endswith(("-done", "-update")):
            return 0.0
        operands = [o.hbm for o in i.operands]
        if i.opcode == "fusion":
            fused = self._called(i)[0]
            total = self._written(fused.root, i.arrays)
            for n, whole in enumerate(operands):
                parts = self._read(fused.parameters[n], fused.root) if whole else 0.0
                total += whole if parts == math.inf else parts
            return total
        if i.base in SLICES:
            indices = sum(operands[1:]) if i.base == "gather" else 0.0
            return (i.size if operands[0] else 0.0) + indices + i.hbm
        if i.updates:
            n = len(i.updates)
            reads = operands[1] if i.opcode == UPDATES[0] else sum(operands[n:])
            return reads + (sum(u.size for u in i.updates) if i.hbm else 0.0)
        return sum(operands) + i.hbm

    def _read(self, i: _Instruction, root: _Instruction) -> float:
        """Bytes that the fusion with this root reads of its parameter `i`; inf: all of it."""
        total = math.inf if i is root else 0.0
        for u in i.users:
            at = [n for n, operand in enumerate(u.operands) if operand is i]
            if u.opcode in ("bitcast", "pad"):  # slices of padding read nothing
                total += self._read(u, root) * i.size / u.size
            elif u.opcode in SLICES and at == [0]:
                total += u.size
            elif u.opcode == "fusion":
                inner = self._called(u)[0]
                for p in (inner.parameters[n] for n in at):
                    same = inner.root.source("bitcast") is p
                    total += self._read(u, root) if same else self._read(p, inner.root)
            elif not (
                (u.opcode == "tuple" and u is root)  # handed on in the same buffer
                or (at[-1] < len(u.updates) and u.lands(root))  # a destination
                or u in self.late
                or u.target.startswith("AsyncCollective")
            ):
                return math.inf
        return total

    def _written(self, i: _Instruction, arrays: list[tuple[float, float]]) -> float:
        """HBM bytes that a fusion writes for its result `i` of `arrays`."""
        i, hbm = i.source("bitcast"), sum(a[1] for a in arrays)
        if i.opcode == "tuple":
            results = [(o.source("bitcast"), [a]) for o, a in zip(i.operands, arrays)]
            return sum(self._written(o, a) for o, a in results if o.opcode != "parameter")
        if i.target == "AsyncCollectiveStart":  # gives the operand, the result and semaphores
            return arrays[1][1]
        if i.target == "AsyncCollectiveDone" or i in self.late or not hbm:
            return 0.0
        if i.opcode == "fusion":
            return self._written(self._called(i)[0].root, arrays)
        if not i.updates:
            return hbm
        before = i.operands[0].source("bitcast")  # perhaps an update of the same destination
        total = self._written(before, arrays) if before.updates else 0.0
        return total + sum(u.size for u in i.updates)

    def _trips(self, loop: _Instruction) -> int:
        if (known := loop.number(r'known_trip_count":{"n":"(\d+)"')) is not None:
            return known
        test, last = (self._called(loop, key)[0].root for key in ("condition", "body"))
        first = loop.operands[0].source("bitcast")
        if "direction=LT" in test.text and first.opcode == last.opcode == "tuple":
            counter, bound = (o.source(*SAME_VALUE) for o in test.operands)
            if (k := counter.number(r"\bindex=(\d+)")) is not None:
                start, update = (t.operands[k].source(*SAME_VALUE) for t in (first, last))
                terms = [o.source(*SAME_VALUE) for o in update.operands]
                steps = [t for t in terms if t.number(r"\bindex=(\d+)") != k]
                if update.opcode == "add" and len(steps) == 1:
                    a, b, step = (i.number(r"^\((-?\d+)\)") for i in (start, bound, steps[0]))
                    if a is not None and b is not None and step:
                        return max(0, -((a - b) // step))
        self.unknown[loop.name] = None
        return 1


def _kernel(call: _Instruction) -> str:
    """Name of a Pallas kernel: it precedes "pallas_call" in the operation's path."""
    path = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call', call.text)
    return path[1] if path else re.sub(r"(\.\d+)+$", "", call.name)


def kernels_of_lowered(text: str) -> dict[str, int]:
    """Calls by name of the Pallas kernel in a TPU program before compilation (StableHLO text)."""
    calls = [line for line in text.splitlines() if "custom_call @tpu_custom_call" in line]
    named = (re.search(r'kernel_name = "([^"]*)"', call) for call in calls)
    return dict(Counter(name[1] if name else "" for name in named))


def analyze(text: str) -> Program:
    """Figures of the program whose compiled text this is."""
    a = _Analysis(text)
    calls = [i for c in a.computations.values() for i in c.instructions.values() if i.target]
    kinds, traffic = (
        {k: (sum(n.values()), sum(size * m for size, m in n.items())) for k, n in figures.items()}
        for figures in (a.collectives, a.traffic)
    )
    return Program(
        {k: Collective(len(a.found[k]), *totals) for k, totals in sorted(kinds.items())},
        sum(moved for _, moved in traffic.values()),
        dict(Counter(i.target for i in calls)),
        dict(Counter(_kernel(i) for i in calls if i.target == "tpu_custom_call")),
        tuple(a.unknown),
        dict(sorted(traffic.items(), key=lambda item: -item[1][1])),
    )
