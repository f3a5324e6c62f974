"""Figures read from the text of a compiled XLA program, each loop counted as often as it runs.

    analyze(jax.jit(f).lower(...).compile().as_text())

XLA's own cost analysis counts the body of a loop once. All branches of a conditional count, as if
each were taken.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ngpt_jax.aot.hlo_text import Computation, Instruction, Module, parse
from ngpt_jax.aot.hlo_traffic import launches, moved
from ngpt_jax.aot.replica_groups import joins_hosts

COLLECTIVES = frozenset(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute "
    "collective-broadcast".split()
)
_SAME_VALUE = ("bitcast", "copy", "copy-start", "copy-done", "convert", "reshape")


@dataclass(frozen=True)
class Collective:
    instructions: int  # in the text
    count: int  # executions
    bytes: float  # of operands or result, the larger, on one device over all executions
    across: float = 0.0  # those of the bytes whose group has devices on several hosts


@dataclass(frozen=True)
class Kernel:
    instructions: int  # in the text
    count: int | None  # executions; None where not known


@dataclass(frozen=True)
class Program:
    collectives: dict[str, Collective]  # by kind: "all-gather" etc.; "send" goes to other slices
    bytes_accessed: float  # read from and written to HBM by one device
    custom_calls: dict[str, int]  # instructions in the text by target
    kernels: dict[str, Kernel]  # by name: those of Pallas, and cuDNN's attention
    launches: int  # executions of instructions that launch a kernel (hlo_traffic.launches)
    unknown_loops: tuple[str, ...]  # the text does not tell their trip count: counted once
    traffic: dict[str, tuple[int, float]]  # executions and bytes_accessed by instruction
    instructions: dict[str, Instruction] = field(repr=False)  # those of ``traffic``


class _Counts:
    """What :func:`_visit` has counted so far, by name: executions by their bytes."""

    def __init__(self) -> None:
        self.collectives: dict[str, Counter[float]] = defaultdict(Counter)
        self.traffic: dict[str, Counter[float]] = defaultdict(Counter)
        self.names: dict[str, set[str]] = defaultdict(set)  # of instructions, by collective
        self.across: dict[str, float] = defaultdict(float)  # bytes between hosts, by collective
        self.launches: Counter[str] = Counter()
        self.instructions: dict[str, Instruction] = {}
        self.unknown_loops: dict[str, Instruction] = {}


def analyze(text: str, hosts: Sequence[int] = (), one_pass: bool = False) -> Program:
    """Figures of the program whose compiled text this is.

    Args:
      text: of the compiled program.
      hosts: the host of each device, in the order in which the program numbers devices; empty:
        all are on one.
      one_pass: count one pass of the outermost loop of unknown length alone, where there is one.
        Such a loop draws tokens.

    >>> program = analyze('''
    ... ENTRY %main (x: f32[8]) -> f32[32] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %g = f32[32]{0} all-gather(%x), dimensions={0}
    ... }''')
    >>> program.collectives
    {'all-gather': Collective(instructions=1, count=1, bytes=128.0, across=0.0)}
    >>> program.bytes_accessed, program.traffic, program.launches
    (160.0, {'g': (1, 160.0)}, 1)
    """
    module, counts = parse(text), _Counts()
    find_late(module)
    _visit(module.entry, 1, counts, hosts)
    if one_pass and counts.unknown_loops:
        loop = next(iter(counts.unknown_loops.values()))
        counts = _Counts()
        for part in ("body", "condition"):
            _visit(loop.called(part)[0], 1, counts, hosts)
    calls = [i for c in module.computations.values() for i in c.instructions.values() if i.target]
    kernels: dict[str, list[Instruction]] = defaultdict(list)
    for i in calls:
        if name := kernel_name(i):
            kernels[name].append(i)
    kinds, traffic = (
        {k: (sum(n.values()), sum(size * m for size, m in n.items())) for k, n in figures.items()}
        for figures in (counts.collectives, counts.traffic)
    )
    return Program(
        {
            k: Collective(len(counts.names[k]), *totals, counts.across[k])
            for k, totals in sorted(kinds.items())
        },
        sum(total for _, total in traffic.values()),
        dict(Counter(i.target for i in calls)),
        {
            name: Kernel(len(several), sum(counts.launches[i.name] for i in several))
            for name, several in kernels.items()
        },
        counts.launches.total(),
        tuple(counts.unknown_loops),
        dict(sorted(traffic.items(), key=lambda item: -item[1][1])),
        counts.instructions,
    )


def find_late(module: Module) -> None:
    """Marks as late what continues or ends a collective that is counted where it starts.

    TPU programs hold one asynchronous all-gather three times, with the same channel: in a fusion
    with AsyncCollectiveStart, in matmuls that move it along and have its semaphore (memory space 2)
    as a parameter, in a fusion with AsyncCollectiveDone.

    >>> module = parse('''
    ... %start (a: f32[8]) -> (f32[8], f32[32], u32[]) {
    ...   %a = f32[8]{0} parameter(0)
    ...   %first = f32[32]{0} all-gather(%a), channel_id=1
    ...   ROOT %s = (f32[8]{0}, f32[32]{0}, u32[]{:S(2)}) custom-call(%first), \
custom_call_target="AsyncCollectiveStart"
    ... }
    ... ENTRY %move (b: f32[8], c: u32[]) -> f32[32] {
    ...   %b = f32[8]{0} parameter(0)
    ...   %c = u32[]{:S(2)} parameter(1)
    ...   ROOT %again = f32[32]{0} all-gather(%b), channel_id=1
    ... }''')
    >>> find_late(module)
    >>> [i.name for c in module.computations.values() for i in c.instructions.values() if i.late]
    ['again']
    """
    started, moving = set(), []
    for c in module.computations.values():
        starts = any(i.target == "AsyncCollectiveStart" for i in c.instructions.values())
        has_semaphore = any("S(2)" in p.type for p in c.parameters.values())
        for i in c.instructions.values():
            key = (i.base, i.number(r"channel_id=(\d+)"))  # in shard_map all have channel 1
            if i.base in COLLECTIVES and starts:
                started.add(key)
            elif i.base in COLLECTIVES and has_semaphore:
                moving.append((i, key))
    for i, key in moving:
        i.late = key in started


def _visit(
    c: Computation, times: int, counts: _Counts, hosts: Sequence[int], fused: bool = False
) -> None:
    """Counts a computation that runs so many times, and what it calls.

    What is inside a fusion moves no bytes of its own, but may be a collective.
    """
    for i in c.instructions.values():
        if i.opcode == "while":
            trips = trip_count(i)
            if trips is None:
                counts.unknown_loops[i.name] = i
                trips = 1
            _visit(i.called("body")[0], times * trips, counts, hosts)
            _visit(i.called("condition")[0], times * (trips + 1), counts, hosts)
        elif i.base in ("call", "async", "conditional", "fusion"):
            keys = "branch_computations|true_computation|false_computation|calls|to_apply"
            for called in i.called(keys):
                _visit(called, times, counts, hosts, fused or i.opcode == "fusion")
        elif (i.base in COLLECTIVES and not i.late) or i.opcode == "send":
            scatters = fused and i.base == "all-reduce" and sliced(i)
            kind = "reduce-scatter" if scatters else i.base
            result = 0.0 if kind == "send" else i.size  # which holds the operand again
            counts.names[kind].add(i.name)
            size = max(sum(o.size for o in i.operands), result)
            counts.collectives[kind][size] += times
            if hosts and joins_hosts(i, hosts):
                counts.across[kind] += times * size
        if not fused and launches(i):
            counts.launches[i.name] += times
        if not fused and (size := moved(i)):
            counts.traffic[i.name][size] += times
            counts.instructions[i.name] = i


def sliced(i: Instruction) -> bool:
    """Whether a fusion keeps only a slice of what it reduces: all-reduce-scatter on TPUs.

    >>> fused = parse('''
    ... ENTRY %all-reduce-scatter (x: f32[32], i: u32[]) -> f32[8] {
    ...   %x = f32[32]{0} parameter(0)
    ...   %i = u32[] parameter(1)
    ...   %r = f32[32]{0} all-reduce(%x), to_apply=%add
    ...   %b = f32[32]{0} bitcast(%r)
    ...   ROOT %s = f32[8]{0} dynamic-slice(%b, %i), dynamic_slice_sizes={8}
    ... }''').entry.instructions
    >>> sliced(fused["r"]), sliced(fused["s"])
    (True, False)
    """
    return any(
        i is u.operands[0] and (u.opcode == "dynamic-slice" or sliced(u))
        for u in i.users
        if u.opcode in ("dynamic-slice", "get-tuple-element", *_SAME_VALUE)
    )


def trip_count(loop: Instruction) -> int | None:
    """How often the body of a while loop runs; None where the text does not tell.

    XLA often knows it. Else it is worked out for a counter that goes up by a constant, from a
    constant, as long as it is less than a constant:

    >>> main = parse('''
    ... %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
    ...   %p = (s32[], f32[8]{0}) parameter(0)
    ...   %i = s32[] get-tuple-element(%p), index=0
    ...   %two = s32[] constant(2)
    ...   %next = s32[] add(%i, %two)
    ...   %h = f32[8]{0} get-tuple-element(%p), index=1
    ...   ROOT %t = (s32[], f32[8]{0}) tuple(%next, %h)
    ... }
    ... %test (q: (s32[], f32[8])) -> pred[] {
    ...   %q = (s32[], f32[8]{0}) parameter(0)
    ...   %j = s32[] get-tuple-element(%q), index=0
    ...   %nine = s32[] constant(9)
    ...   ROOT %less = pred[] compare(%j, %nine), direction=LT
    ... }
    ... ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
    ...   %x = f32[8]{0} parameter(0)
    ...   %zero = s32[] constant(0)
    ...   %init = (s32[], f32[8]{0}) tuple(%zero, %x)
    ...   ROOT %loop = (s32[], f32[8]{0}) while(%init), condition=%test, body=%body
    ... }''').entry
    >>> trip_count(main.root)  # 0, 2, 4, 6, 8
    5
    """
    if (known := loop.number(r'known_trip_count":{"n":"(\d+)"')) is not None:
        return known
    test, last = (loop.called(key)[0].root for key in ("condition", "body"))
    first = loop.operands[0].source("bitcast")
    if "direction=LT" not in test.text or not first.opcode == last.opcode == "tuple":
        return None
    counter, bound = (o.source(*_SAME_VALUE) for o in test.operands)
    place = counter.number(r"\bindex=(\d+)")  # of the counter in the tuple
    if place is None:
        return None
    start, update = (t.operands[place].source(*_SAME_VALUE) for t in (first, last))
    terms = [o.source(*_SAME_VALUE) for o in update.operands]
    steps = [t for t in terms if t.number(r"\bindex=(\d+)") != place]
    if update.opcode != "add" or len(steps) != 1:
        return None
    a, b, step = (i.number(r"^\((-?\d+)\)") for i in (start, bound, steps[0]))
    return max(0, -((a - b) // step)) if a is not None and b is not None and step else None


def kernel_name(call: Instruction) -> str:
    """Name of a custom call that is a Pallas kernel or cuDNN's attention; "" of another.

    The name of a Pallas kernel precedes "pallas_call" in the operation's path.

    >>> call = parse('''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %c = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/jvp(residual_step)/pallas_call"}
    ... }''').entry.root
    >>> kernel_name(call)
    'residual_step'
    """
    if call.target.startswith("__cudnn$fmha"):
        return call.target
    if path := re.search(r'op_name="(?:[^"]*[/(])?([^"/()]+)\)*/pallas_call', call.text):
        return path[1]
    unnamed = call.target in ("tpu_custom_call", "__gpu$xla.gpu.triton")
    return re.sub(r"(\.\d+)+$", "", call.name) if unnamed else ""


def kernels_of_lowered(text: str) -> dict[str, Kernel]:
    """Kernels by name in a TPU program before compilation (StableHLO text).

    >>> kernels_of_lowered('%1 = stablehlo.custom_call @tpu_custom_call(%0) {kernel_name = "dq"}')
    {'dq': Kernel(instructions=1, count=None)}
    """
    calls = [line for line in text.splitlines() if "custom_call @tpu_custom_call" in line]
    named = (re.search(r'kernel_name = "([^"]*)"', call) for call in calls)
    found = Counter(name[1] if name else "" for name in named)
    return {name: Kernel(n, None) for name, n in found.items()}
