"""Parts of the model, kernels launched, hosts and passes of a loop, by hand-written programs."""

import pytest

from ngpt_jax.aot.hlo import Kernel, analyze
from ngpt_jax.aot.hlo_parts import by_part, largest, place_of

STEP = "jit(train_step)"
HIDDEN = "(Transformer.hidden_and_table)"
TRAINING = f"""
%fused (p: f32[10]) -> f32[10] {{
  %p = f32[10]{{0}} parameter(0)
  ROOT %n = f32[10]{{0}} negate(%p), metadata={{op_name="{STEP}/jvp{HIDDEN}/\
layers/layers._mlp/mul"}}
}}

ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0), metadata={{op_name="x"}}
  %a = f32[10]{{0}} fusion(%x), kind=kLoop, calls=%fused
  %b = f32[10]{{0}} add(%a, %a), metadata={{op_name="{STEP}/transpose(jvp{HIDDEN})/while/body/\
closed_call/checkpoint/layers/layers._attention/layers._linear/dot_general"}}
  %c = f32[10]{{0}} custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", \
metadata={{op_name="{STEP}/jvp{HIDDEN}/layers/residual_step/pallas_call"}}
  %d = f32[10]{{0}} negate(%c), metadata={{op_name="{STEP}/jvp()/while/body/closed_call/exp"}}
  %e = f32[10]{{0}} negate(%d), metadata={{op_name="{STEP}/mul"}}
  %f = f32[10]{{0}} all-reduce(%e), to_apply=%add, metadata={{op_name="{STEP}/reduce_sum"}}
  %s = (f32[10]{{0}}, f32[10]{{0}}, u32[]) copy-start(%f)
  %t = f32[10]{{0}} copy-done(%s)
  ROOT %r = f32[10]{{0}} bitcast(%t)
}}
"""


def test_bytes_by_part_add_up_to_all():
    program = analyze(TRAINING)
    parts = by_part(program)
    assert {name: tuple(part) for name, part in parts.items()} == {
        "MLP": (80, 0, 1),
        "attention": (0, 120, 1),
        "residual steps": (80, 0, 1),
        "loss and output table": (80, 0, 1),
        "optimizer": (80, 0, 1),
        "collectives": (80, 0, 1),
        "other": (80, 0, 1),
    }
    assert sum(p.forward + p.backward for p in parts.values()) == program.bytes_accessed
    assert program.launches == 7  # neither parameters, nor bitcasts, nor what only ends a copy
    assert program.kernels == {"residual_step": Kernel(1, 1)}
    first, *_ = rows = largest(program, 3)
    assert len(rows) == 3 and first["type"] == "f32[10]" and first["bytes"] == 120
    assert first["place"] == "backward layers._linear/dot_general"
    assert place_of(program.instructions["a"]) == "layers._mlp/mul"


def test_instructions_of_one_type_and_place_are_one_row():
    again = TRAINING.replace("%e = f32[10]{0} negate(%d)", "%g = f32[10]{0} negate(%d), \
metadata={op_name=\"jit(train_step)/mul\"}\n  %e = f32[10]{0} negate(%g)")  # fmt: skip
    row = next(r for r in largest(analyze(again), 9) if r["place"] == "mul")
    assert (row["count"], row["bytes"]) == (2, 160)


COLLECTIVE = """
ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%x), REPLICAS dimensions={0}
}"""


@pytest.mark.parametrize(
    ("replicas", "across"),
    [
        ("replica_groups={{0,1},{2,3}},", 0),
        ("replica_groups={{0,2},{1,3}},", 128),
        ("replica_groups=[2,2]<=[4],", 0),
        ("replica_groups=[2,2]<=[2,2]T(1,0),", 128),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'},", 0),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'},", 128),
        ("replica_groups=mesh['a'=4], device_ids=([4]) {'a':(2)2},", 0),
        ("replica_groups=mesh['a'=4], device_ids=([4]) {'a':(1)2},", 128),
        ("replica_groups={},", 128),
        ("", 128),
    ],
)
def test_what_goes_between_hosts(replicas, across):
    text = COLLECTIVE.replace("REPLICAS", replicas)
    assert analyze(text, [0, 0, 1, 1]).collectives["all-gather"].across == across
    assert analyze(text).collectives["all-gather"].across == 0


DRAWING = """
%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %h = f32[10]{0} get-tuple-element(%p), index=1
  %n = f32[10]{0} negate(%h)
  ROOT %t = (s32[], f32[10]{0}) tuple(%i, %n)
}

%test (q: (s32[], f32[10])) -> pred[] {
  %q = (s32[], f32[10]{0}) parameter(0)
  ROOT %more = pred[] custom-call(), custom_call_target="More"
}

ENTRY %main (x: (s32[], f32[10])) -> (s32[], f32[10]) {
  %x = (s32[], f32[10]{0}) parameter(0)
  %y = (s32[], f32[10]{0}) copy(%x)
  ROOT %loop = (s32[], f32[10]{0}) while(%y), condition=%test, body=%body
}"""


def test_one_pass_of_a_loop_of_unknown_length():
    whole, token = analyze(DRAWING), analyze(DRAWING, one_pass=True)
    assert whole.unknown_loops == ("loop",)
    assert token.traffic == {"n": (1, 80.0), "more": (1, 1.0)} and token.launches == 2
    assert whole.launches == 1 + 1 + 2  # the test runs once more than the body
    known = analyze(TRAINING, one_pass=True)
    assert known.bytes_accessed == analyze(TRAINING).bytes_accessed
