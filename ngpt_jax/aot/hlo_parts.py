"""Where in the model an instruction of a compiled program belongs, and what each part moves.

Programs carry the path of every operation: jit(train_step)/transpose(jvp(Transformer...))/layers/
layers._mlp/mul, for example. A fusion has the path of its result.
"""

import re
from typing import Any, NamedTuple

from ngpt_jax.aot.hlo import COLLECTIVES, Program
from ngpt_jax.aot.hlo_text import Instruction

# The first pattern found in the path names the part.
_PARTS = (
    ("attention", r"[./]_?attention\b|dot_product_attention|splash|\bqk"),
    ("MLP", r"[./]_?mlp\b|swiglu|jit\(silu\)"),
    ("residual steps", r"[./]_step\b|residual_step"),
    ("norms", r"norm\b|norm_backward|/layers/|/Block/"),
    ("drawing", r"gumbel|log_softmax|take_along_axis|/vmap\(\)|argmax|sort|top_k"),
    ("embedding", r"jit\(_take\)|scatter|embed|Transformer\.setup"),
    ("loss and output table", r"jvp\(\)|loss|cross_entropy|vd->btv|d->..v"),
    ("stacks of layers", r"hidden_and_table"),
    ("optimizer", r"^jit\(train_step\)"),
)
OTHER = "other"
_NO_PLACE = re.compile(r"jit\(\w+\)|jvp\(\)|while|body|closed_call|checkpoint|layers|Block|pjit")


class Part(NamedTuple):
    forward: float  # bytes
    backward: float  # bytes, with what is computed again
    launches: int


def path_of(i: Instruction, steps: int = 3) -> str:
    """The path of an instruction's operation; "" where the text has none.

    Of a copy without a path it is the path of what uses it, within so many steps.

    >>> from ngpt_jax.aot.hlo_text import parse
    >>> main = parse('''
    ... %fused (p: f32[8]) -> f32[8] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %n = f32[8]{0} negate(%p), metadata={op_name="jit(f)/layers/layers._mlp/neg"}
    ... }
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0), metadata={op_name="x"}
    ...   ROOT %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
    ... }''').entry
    >>> path_of(main.root), path_of(main.instructions["x"])
    ('jit(f)/layers/layers._mlp/neg', '')
    """
    if found := re.search(r'op_name="([^"]*/[^"]*)"', i.text):
        return found[1]
    inside: list[Instruction] = []
    if i.opcode == "fusion":
        (fused,) = i.called()
        inside = [fused.root, *fused.root.operands, *fused.instructions.values()]
    users = i.users if steps and i.opcode != "parameter" else []
    paths = (*(path_of(x, 0) for x in inside), *(path_of(u, steps - 1) for u in users))
    return next(filter(None, paths), "")


def part_of(i: Instruction) -> str:
    """The part of the model that an instruction belongs to, or "collectives" or "other"."""
    if i.base in COLLECTIVES:
        return "collectives"
    path = path_of(i)
    return next((part for part, pattern in _PARTS if re.search(pattern, path)), OTHER)


def is_backward(i: Instruction) -> bool:
    """Whether it belongs to the backward pass, or computes again for it."""
    return "transpose(" in path_of(i)


def place_of(i: Instruction) -> str:
    """A short form of the path, for people: "backward layers._mlp/mul"."""
    path = path_of(i)
    names = [name for name in path.split("/") if not _NO_PLACE.fullmatch(name)]
    names = [re.sub(r"^transpose\((.*)\)$", r"\1", name) for name in names]
    names = [re.sub(r"^jvp\((.*)\)$", r"\1", name) for name in names]
    names = [name for name in names if name and name != "Transformer.hidden_and_table"]
    text = "/".join(names[-2:]) or i.opcode
    return f"{'backward ' if is_backward(i) else ''}{text}"


def by_part(program: Program) -> dict[str, Part]:
    """Bytes and launches by part of the model, the largest first; the bytes add up to all."""
    found: dict[str, Part] = {}
    for name, (count, size) in program.traffic.items():
        i = program.instructions[name]
        part = part_of(i)
        forward, backward, launches = found.get(part, Part(0.0, 0.0, 0))
        if is_backward(i):
            backward += size
        else:
            forward += size
        found[part] = Part(forward, backward, launches + count)
    return dict(sorted(found.items(), key=lambda item: -(item[1].forward + item[1].backward)))


def largest(program: Program, count: int) -> list[dict[str, Any]]:
    """What moves the most: instructions of one type and place together, as the layers have them."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (times, size) in program.traffic.items():
        i = program.instructions[name]
        type_, place = re.sub(r"{[^}]*}|/\*.*?\*/", "", i.type), place_of(i)
        row: dict[str, Any] = {"name": name, "type": type_, "place": place, "part": part_of(i)}
        row = found.setdefault((type_, place), row | {"count": 0, "bytes": 0.0})
        row["count"] += times
        row["bytes"] += size
    return sorted(found.values(), key=lambda row: -row["bytes"])[:count]
