"""Bytes that an instruction of a compiled program reads from HBM and writes to it.

Sizes are those of the arrays, without the padding of tiled layouts.
"""

import math

from ngpt_jax.aot.hlo_text import Array, Instruction

SLICES = ("dynamic-slice", "slice", "gather")
# These move nothing: names, values of no size, frames of computations counted by themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id "
    "replica-id add-dependency domain while call conditional async "
    "AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound".split()
)


# Where only a slice of the result is read, only that slice of the operands is.
_ELEMENTWISE = frozenset(
    "abs add and clamp compare convert divide exponential log maximum minimum multiply negate or "
    "power rsqrt select sqrt subtract tanh".split()
)


def launches(i: Instruction) -> bool:
    """Whether a GPU launches a kernel, a copy or a collective for it, where it is not fused.

    This is what the report calls kernels launched. Some custom calls launch more than one.
    """
    return not (_FREE & {i.base, i.target} or i.opcode.endswith(("-done", "-update")))


def moved(i: Instruction) -> float:
    """HBM bytes of one execution: all of the operands and the result, but of slices their part.

    >>> from ngpt_jax.aot.hlo_text import parse
    >>> main = parse('''
    ... ENTRY %main (x: f32[100], i: s32[], u: f32[2]) -> f32[100] {
    ...   %x = f32[100]{0} parameter(0)
    ...   %i = s32[]{:S(6)} parameter(1)
    ...   %u = f32[2]{0} parameter(2)
    ...   %n = f32[100]{0} negate(%x)
    ...   %s = f32[5]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={5}
    ...   ROOT %d = f32[100]{0} dynamic-update-slice(%n, %u, %i)
    ... }''').entry.instructions
    >>> [moved(main[name]) for name in "xnsd"]
    [0.0, 800.0, 40.0, 16.0]
    """
    if not launches(i):
        return 0.0
    operands = [o.hbm for o in i.operands]
    if i.opcode == "fusion":
        (fused,) = i.called()
        total = written(fused.root, i.arrays)
        for n, whole in enumerate(operands):
            parts = read(fused.parameters[n], fused.root) if whole else 0.0
            total += whole if parts == math.inf else parts
        return total
    if i.base in SLICES:
        indices = sum(operands[1:]) if i.base == "gather" else 0.0
        return (i.size if operands[0] else 0.0) + indices + i.hbm
    if i.updates:
        n = len(i.updates)
        reads = operands[1] if i.opcode == "dynamic-update-slice" else sum(operands[n:])
        return reads + (sum(u.size for u in i.updates) if i.hbm else 0.0)
    scratch = i.arrays[-1].hbm if i.target.startswith(("__cublas", "cublas")) else 0.0
    return sum(operands) + i.hbm - (scratch if len(i.arrays) > 1 else 0.0)


def read(p: Instruction, root: Instruction) -> float:
    """Bytes of its parameter ``p`` that the fusion with this root reads; inf: all of it.

    A fusion that slices its parameter, or what it computes from it entry by entry, reads the slices
    alone, and one that updates its parameter in place does not read it.

    >>> from ngpt_jax.aot.hlo_text import parse
    >>> fused = parse('''
    ... ENTRY %fused (p: f32[100], i: s32[], q: f32[100]) -> f32[100] {
    ...   %p = f32[100]{0} parameter(0)
    ...   %i = s32[] parameter(1)
    ...   %q = f32[100]{0} parameter(2)
    ...   %n = f32[100]{0} negate(%p)
    ...   %s = f32[5]{0} dynamic-slice(%n, %i), dynamic_slice_sizes={5}
    ...   ROOT %u = f32[100]{0} dynamic-update-slice(%q, %s, %i)
    ... }''').entry
    >>> [read(p, fused.root) for p in fused.parameters.values()]
    [20.0, inf, 0.0]
    """
    total = math.inf if p is root else 0.0
    for u in p.users:
        places = [n for n, operand in enumerate(u.operands) if operand is p]
        if u.opcode in _ELEMENTWISE:
            # What is handed to a collective is computed whole.
            total += read(u, root) * p.size / u.size or math.inf
        elif u.opcode in ("bitcast", "pad"):  # slices of what is padded do not read the padding
            total += read(u, root) * p.size / u.size
        elif u.opcode in SLICES and places == [0]:
            total += u.size
        elif u.opcode == "fusion":
            (inner,) = u.called()
            for q in (inner.parameters[n] for n in places):
                same = inner.root.source("bitcast") is q
                total += read(u, root) if same else read(q, inner.root)
        elif not (
            (u.opcode == "tuple" and u is root)  # handed on in the same buffer
            or (places[-1] < len(u.updates) and in_result(u, root))  # updated in place
            or u.late
            or u.target.startswith("AsyncCollective")
        ):
            return math.inf
    return total


def in_result(i: Instruction, root: Instruction) -> bool:
    """Whether a fusion's result is ``i`` or holds it, so that its updates are made in place.

    >>> from ngpt_jax.aot.hlo_text import parse
    >>> fused = parse('''
    ... ENTRY %fused (p: f32[100], u: f32[5], i: s32[]) -> (f32[20,5], f32[5]) {
    ...   %p = f32[100]{0} parameter(0)
    ...   %u = f32[5]{0} parameter(1)
    ...   %i = s32[] parameter(2)
    ...   %d = f32[100]{0} dynamic-update-slice(%p, %u, %i)
    ...   %b = f32[20,5]{1,0} bitcast(%d)
    ...   %n = f32[5]{0} negate(%u)
    ...   ROOT %t = (f32[20,5]{1,0}, f32[5]{0}) tuple(%b, %n)
    ... }''').entry
    >>> [in_result(fused.instructions[name], fused.root) for name in "du"]
    [True, False]
    """
    return i is root or any(
        in_result(u, root)
        for u in i.users
        if u.opcode in ("bitcast", "tuple") or (u.updates and u.operands[0] is i)
    )


def written(i: Instruction, arrays: list[Array]) -> float:
    """HBM bytes that a fusion writes for its result, or for an element of its tuple.

    Args:
      i: the root of the fusion, or an operand of the root where that is a tuple.
      arrays: of that result, as the type of the fusion has them.

    An update in place writes the update alone; a parameter that is handed on is not written.

    >>> from ngpt_jax.aot.hlo_text import arrays_of, parse
    >>> fused = parse('''
    ... ENTRY %fused (p: f32[100], u: f32[5], i: s32[]) -> (f32[100], f32[5], f32[5]) {
    ...   %p = f32[100]{0} parameter(0)
    ...   %u = f32[5]{0} parameter(1)
    ...   %i = s32[] parameter(2)
    ...   %d = f32[100]{0} dynamic-update-slice(%p, %u, %i)
    ...   %n = f32[5]{0} negate(%u)
    ...   ROOT %t = (f32[100]{0}, f32[5]{0}, f32[5]{0}) tuple(%d, %n, %u)
    ... }''').entry
    >>> written(fused.root, arrays_of(fused.root.type))
    40.0
    """
    i, hbm = i.source("bitcast"), sum(a.hbm for a in arrays)
    if i.opcode == "tuple":
        results = [(o.source("bitcast"), [a]) for o, a in zip(i.operands, arrays)]
        return sum(written(o, a) for o, a in results if o.opcode != "parameter")
    if i.target == "AsyncCollectiveStart":  # its type: the operand, the result and semaphores
        return arrays[1].hbm
    if i.target == "AsyncCollectiveDone" or i.late or not hbm:
        return 0.0
    if i.opcode == "fusion":
        return written(i.called()[0].root, arrays)
    if not i.updates:
        return hbm
    before = i.operands[0].source("bitcast")  # perhaps an update of the same destination
    total = written(before, arrays) if before.updates else 0.0
    return total + sum(u.size for u in i.updates)
