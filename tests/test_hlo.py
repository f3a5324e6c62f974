"""Figures from the text of compiled programs, against numbers worked out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ngpt_jax.aot.hlo import Collective, Kernel, Program, analyze, kernels_of_lowered

ROOT = Path(__file__).parents[1]


def program(entry: str, others: str = "") -> Program:
    """Figures of a program: instructions of ENTRY, and other computations."""
    body = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    head = 'HloModule jit_f, is_scheduled=true\n\nFileNames\n1 "f.py"\n\n'
    return analyze(f"{head}{textwrap.dedent(others)}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("pred", 1), ("s4", 0.5), ("u4", 0.5), ("s8", 1), ("f8e4m3fn", 1), ("bf16", 2), ("f16", 2),
        ("u16", 2), ("f32", 4), ("s32", 4), ("f64", 8), ("c64", 8), ("c128", 16), ("token", 0),
    ],
)  # fmt: skip
def test_an_operation_reads_its_operands_and_writes_its_result(dtype, size):
    figures = program(f"""
        %x = {dtype}[3,8]{{1,0:T(8,128)(2,1)}} parameter(0)
        %s = {dtype}[] constant(1)
        %t = ({dtype}[3,8]{{1,0}}, ({dtype}[3,8]{{1,0}}, /*index=2*/s32[])) tuple(%x, %x)
        %g = {dtype}[3,8]{{1,0}} get-tuple-element(%t), index=0
        %b = {dtype}[24]{{0}} bitcast(%g)
        ROOT %y = {dtype}[24]{{0}} multiply(%b, {dtype}[] %s)
    """)
    assert figures.bytes_accessed == (24 + 1 + 24) * size
    assert set(figures.traffic) == ({"y"} if size else set())


def test_vmem_is_no_traffic():
    figures = program("""
        %x = f32[10]{0:T(128)} parameter(0)
        %y = f32[10]{0:T(128)S(1)} negate(%x)
        %z = f32[10]{0:T(128)S(1)} negate(%y)
        %c = (f32[10]{0:S(1)}, f32[10]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
        %d = f32[10]{0:S(1)} copy-done(%c)
        %s = ((f32[10]{0}), f32[4]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4]}
        %e = f32[4]{0:S(1)} slice-done(%s)
        %u = f32[1]{0} slice(%z), slice={[0:1]}
        ROOT %w = f32[10]{0:T(128)} add(%z, %d)
    """)
    assert figures.traffic == dict.fromkeys("ycw", (1, 40.0)) | {"s": (1, 16.0), "u": (1, 4.0)}
    assert figures.bytes_accessed == 140


def test_slices_and_updates_move_only_their_part():
    figures = program("""
        %x = f32[100,10]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %rows = s32[3]{0} parameter(2)
        %new = f32[2,10]{1,0} parameter(3)
        %slice = f32[5,10]{1,0} slice(%x), slice={[0:5], [0:10]}
        %dynamic = f32[2,10]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={2,10}
        %gather = f32[3,10]{1,0} gather(%x, %rows), offset_dims={1}
        %update = f32[100,10]{1,0} dynamic-update-slice(%x, %new, %i, %i)
        ROOT %scatter = f32[100,10]{1,0} scatter(%update, %rows, %gather), to_apply=%add
    """)
    assert {name: moved for name, (_, moved) in figures.traffic.items()} == {
        "slice": 400, "dynamic": 160, "gather": 120 + 12 + 120, "update": 160,
        "scatter": 120 + 12 + 120,
    }  # fmt: skip


LOOPS = """
    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %c = f32[] add(%a, %b)
    }

    %inner_body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
      %p = (s32[], f32[10]{0}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %h = f32[10]{0} get-tuple-element(%p), index=1
      %sum = f32[10]{0} all-reduce(%h), replica_groups={{0,1}}, to_apply=%add
      ROOT %t = (s32[], f32[10]{0}) tuple(%i, %sum)
    }

    %inner_test (q: (s32[], f32[10])) -> pred[] {
      %q = (s32[], f32[10]{0}) parameter(0)
      ROOT %more = pred[] custom-call(%q), custom_call_target="More"
    }

    %outer_body (r: (f32[10], s32[])) -> (f32[10], s32[]) {
      %r = (f32[10]{0}, s32[]{:S(6)}) parameter(0)
      %j = s32[]{:S(6)} get-tuple-element(%r), index=1
      %step = s32[]{:S(6)} constant(STEP)
      %next = s32[]{:S(6)} add(%j, %step)
      %k = f32[10]{0} get-tuple-element(%r), index=0
      %u = (s32[], f32[10]{0}) tuple(%j, %k)
      %inner = (s32[], f32[10]{0}) while(%u), condition=%inner_test, body=%inner_body KNOWN
      %v = f32[10]{0} get-tuple-element(%inner), index=1
      %w = f32[10]{0} negate(%v)
      ROOT %x = (f32[10]{0}, s32[]{:S(6)}) tuple(%w, %next)
    }

    %outer_test (y: (f32[10], s32[])) -> pred[] {
      %bound = s32[]{:S(6)} constant(9)
      %y = (f32[10]{0}, s32[]{:S(6)}) parameter(0)
      %at = s32[]{:S(6)} get-tuple-element(%y), index=1
      ROOT %less = pred[] compare(%at, %bound), direction=DIRECTION
    }
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'


@pytest.mark.parametrize(
    ("step", "direction", "known", "outer", "inner", "unknown"),
    [
        (1, "LT", KNOWN, 7, 5, ()),
        (2, "LT", KNOWN, 4, 5, ()),
        (1, "EQ", KNOWN, 1, 5, ("outer",)),
        (1, "LT", "", 7, 1, ("inner",)),
    ],
)
def test_loops_multiply(step, direction, known, outer, inner, unknown):
    others = LOOPS.replace("STEP", str(step)).replace("DIRECTION", direction)
    figures = program(
        """
        %x = f32[10]{0} parameter(0)
        %two = s32[]{:S(6)} constant(2)
        %start = s32[]{:S(6)} copy(%two)
        %t = (f32[10]{0}, s32[]{:S(6)}) tuple(%x, %start)
        ROOT %outer = (f32[10]{0}, s32[]{:S(6)}) while(%t), condition=%outer_test, body=%outer_body
        """,
        others.replace("KNOWN", known),
    )
    times = outer * inner
    assert figures.collectives == {"all-reduce": Collective(1, times, times * 40)}
    assert figures.traffic["sum"] == (times, times * 80)
    assert figures.traffic["w"] == (outer, outer * 80)
    assert figures.traffic["less"] == (outer + 1, outer + 1)  # a condition runs once more
    assert figures.unknown_loops == unknown


def test_calls_and_branches_are_counted():
    others = """
        %one (a: f32[10]) -> f32[10] {
          %a = f32[10]{0} parameter(0)
          ROOT %b = f32[10]{0} negate(%a)
        }
    """
    two = others.replace("one", "two").replace("%a", "%c").replace("%b", "%d").replace("a:", "c:")
    figures = program(
        """
        %x = f32[10]{0} parameter(0)
        %p = pred[] parameter(1)
        %y = f32[10]{0} call(%x), to_apply=%one
        ROOT %z = f32[10]{0} conditional(%p, %y, %y), branch_computations={%one, %two}
        """,
        textwrap.dedent(others) + textwrap.dedent(two),
    )
    assert figures.traffic == {"b": (2, 160.0), "d": (1, 80.0)}


def fusion(inside: str, operands: str, result: str, types: list[str], others: str = "") -> float:
    """HBM bytes of a fusion whose operands and own parameters are p0, p1, ... of `types`."""
    parameters = "\n".join(f"  %p{n} = {t} parameter({n})" for n, t in enumerate(types))
    inside = textwrap.indent(textwrap.dedent(inside).strip(), "  ")
    fused = f"%fused (p0: f32[]) -> f32[] {{\n{parameters}\n{inside}\n}}\n"
    call = f"ROOT %fusion = {result} fusion({operands}), kind=kLoop, calls=%fused"
    entry = textwrap.dedent(parameters)
    return program(f"{entry}\n{call}", textwrap.dedent(others) + fused).bytes_accessed


BIG, SMALL, INDEX = "f32[36,100]{1,0}", "f32[1,100]{1,0}", "s32[]{:S(6)}"
SLICE = f"{SMALL} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={{1,100}}"


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (f"ROOT %s = {SLICE}", 800),
        (f"%s = {SLICE}\nROOT %n = {SMALL} negate(%s)", 800),
        (f"%s = {SLICE}\n%t = {SLICE}\nROOT %n = {SMALL} add(%s, %t)", 1200),
        ("%b = f32[3600]{0} bitcast(%p0)\n%s = f32[100]{0} slice(%b), slice={[0:100]}\n"
         f"ROOT %n = {SMALL} bitcast(%s)", 800),
        # The padding makes half of what is sliced, and is not read.
        ("%z = f32[] constant(0)\n%b = f32[72,100]{1,0} pad(%p0, %z), padding=0_36x0_0\n"
         "%s = f32[2,100]{1,0} dynamic-slice(%b, %p1, %p1)\n"
         f"ROOT %n = {SMALL} reduce(%s, %z), to_apply=%add", 800),
        (f"%s = {SLICE}\n%all = {SMALL} reduce(%p0, %p0), to_apply=%add\n"
         f"ROOT %n = {SMALL} add(%s, %all)", 14400 + 400),
        (f"%s = {SMALL} broadcast(%p1), dimensions={{}}\nROOT %n = {SMALL} negate(%s)", 400),
    ],
)  # fmt: skip
def test_a_fusion_reads_the_slices_that_it_uses(inside, expected):
    assert fusion(inside, "%p0, %p1", SMALL, [BIG, INDEX]) == expected


def test_a_fusion_reads_slices_taken_in_a_fusion_inside():
    inner = f"""
        %inner (q: {BIG}, i: s32[]) -> {SMALL} {{
          %q = {BIG} parameter(0)
          %i = s32[] parameter(1)
          ROOT %s = {SMALL} dynamic-slice(%q, %i, %i), dynamic_slice_sizes={{1,100}}
        }}

        %view (v: {BIG}) -> {BIG} {{
          %v = {BIG} parameter(0)
          ROOT %b = {BIG} bitcast(%v)
        }}
    """
    inside = f"""
        %same = {BIG} fusion(%p0), kind=kLoop, calls=%view
        %part = {SMALL} fusion(%same, %p1), kind=kLoop, calls=%inner
        ROOT %n = {SMALL} negate(%part)
    """
    assert fusion(inside, "%p0, %p1", SMALL, [BIG, INDEX], inner) == 800
    whole = f"%same = {BIG} fusion(%p0), kind=kLoop, calls=%view\nROOT %n = {SMALL} foo(%same)"
    assert fusion(whole, "%p0, %p1", SMALL, [BIG, INDEX], inner) == 14400 + 400


UPDATE = f"{BIG} dynamic-update-slice(%p0, %p1, %p2, %p2)"


@pytest.mark.parametrize(
    ("inside", "result", "expected"),
    [
        (f"ROOT %u = {UPDATE}", BIG, 800),
        (f"%u = {UPDATE}\nROOT %b = f32[3600]{{0}} bitcast(%u)", "f32[3600]{0}", 800),
        (f"%u = {UPDATE}\n%n = {SMALL} negate(%p1)\nROOT %t = ({BIG}, {SMALL}) tuple(%u, %n)",
         f"({BIG}, {SMALL})", 400 + 400 + 400),
        # Handed on beside it: the same buffer.
        (f"%u = {UPDATE}\nROOT %t = ({BIG}, {SMALL}) tuple(%u, %p1)", f"({BIG}, {SMALL})", 800),
        # Two updates of one destination.
        (f"%u = {UPDATE}\nROOT %v = {BIG} dynamic-update-slice(%u, %p1, %p2, %p2)", BIG, 1200),
        # Accumulated in place: reads the old part too.
        (f"%s = {SMALL} dynamic-slice(%p0, %p2, %p2)\n%n = {SMALL} add(%s, %p1)\n"
         f"ROOT %u = {BIG} dynamic-update-slice(%p0, %n, %p2, %p2)", BIG, 1200),
        (f"%u = {UPDATE}\nROOT %n = {BIG} negate(%u)", BIG, 14400 + 400 + 14400),
        (f"ROOT %s = {BIG} scatter(%p0, %p2, %p1), to_apply=%add", BIG, 800),
        (f"ROOT %u = {UPDATE}", BIG.replace("}", ":S(1)}"), 400),
    ],
)  # fmt: skip
def test_a_fusion_updates_in_place(inside, result, expected):
    assert fusion(inside, "%p0, %p1, %p2", result, [BIG, SMALL, INDEX]) == expected


def test_collectives_count_the_larger_side_and_async_pairs_once():
    figures = program(
        """
        %x = f32[10]{0} parameter(0)
        %y = bf16[4]{0} parameter(1)
        %ag = (f32[10]{0}, f32[40]{0}) all-gather-start(%x), dimensions={0}
        %agd = f32[40]{0} all-gather-done(%ag)
        %ag2 = ((f32[10]{0}, bf16[4]{0}), (f32[40]{0}, bf16[16]{0})) all-gather-start(%x, %y)
        %ar = (f32[10]{0}, bf16[4]{0}) all-reduce-start(%x, %y), to_apply=%add
        %ard = (f32[10]{0}, bf16[4]{0}) all-reduce-done(%ar)
        %cp = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
        %cpd = f32[10]{0} collective-permute-done(%cp)
        %rs = ((f32[40]{0}), f32[10]{0}, u32[]) async-start(%agd), calls=%wrapped
        %rsu = ((f32[40]{0}), f32[10]{0}, u32[]) async-update(%rs), calls=%wrapped
        %rsd = f32[10]{0} async-done(%rsu), calls=%wrapped
        ROOT %aa = f32[10]{0} all-to-all(%rsd), dimensions={0}
        """,
        """
        %wrapped (w: f32[40]) -> f32[10] {
          %w = f32[40]{0} parameter(0)
          ROOT %scattered = f32[10]{0} reduce-scatter(%w), dimensions={0}, to_apply=%add
        }
        """,
    )
    assert figures.collectives == {
        "all-gather": Collective(2, 2, 160 + 160 + 32),
        "all-reduce": Collective(1, 1, 48),
        "collective-permute": Collective(1, 1, 40),
        "reduce-scatter": Collective(1, 1, 160),
        "all-to-all": Collective(1, 1, 40),
    }
    assert {name: moved for name, (_, moved) in figures.traffic.items()} == {
        "ag": 200, "ag2": 48 + 192, "ar": 96, "cp": 80, "scattered": 200, "aa": 80,
    }  # fmt: skip


def test_async_collective_fusions_of_a_tpu():
    """One all-gather, written three times; another of the same channel is its own."""
    gather = "all-gather({}), channel_id=1, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
    flags = "f32[10]{0}, f32[40]{0}, u32[]{:S(2)}"
    others = f"""
        %start (a: f32[10]) -> ({flags}) {{
          %a = f32[10]{{0}} parameter(0)
          %a1 = f32[40]{{0}} {gather.format("%a")}
          ROOT %a2 = ({flags}) custom-call(%a1), custom_call_target="AsyncCollectiveStart"
        }}

        %move (b0: f32[10], b1: f32[40], b2: u32[], b3: f32[8]) -> (f32[8], {flags}) {{
          %b0 = f32[10]{{0}} parameter(0)
          %b1 = f32[40]{{0}} parameter(1)
          %b2 = u32[]{{:S(2)}} parameter(2)
          %b3 = f32[8]{{0}} parameter(3)
          %b4 = f32[8]{{0}} negate(%b3)
          %b5 = f32[40]{{0}} {gather.format("%b0")}
          ROOT %b6 = (f32[8]{{0}}, {flags}) tuple(%b4, %b0, %b5, %b2)
        }}

        %done (c0: f32[10], c1: f32[40], c2: u32[]) -> f32[40] {{
          %c0 = f32[10]{{0}} parameter(0)
          %c1 = f32[40]{{0}} parameter(1)
          %c2 = u32[]{{:S(2)}} parameter(2)
          %c3 = f32[40]{{0}} {gather.format("%c0")}
          ROOT %c4 = f32[40]{{0}} custom-call(%c0, %c1, %c3, %c2), custom_call_target="AsyncCollectiveDone"
        }}
    """  # noqa: E501
    figures = program(
        f"""
        %x = f32[10]{{0}} parameter(0)
        %y = f32[8]{{0}} parameter(1)
        %one = ({flags}) fusion(%x), kind=kCustom, calls=%start
        %one.0 = f32[10]{{0}} get-tuple-element(%one), index=0
        %one.1 = f32[40]{{0}} get-tuple-element(%one), index=1
        %one.2 = u32[]{{:S(2)}} get-tuple-element(%one), index=2
        %two = (f32[8]{{0}}, {flags}) fusion(%one.0, %one.1, %one.2, %y), calls=%move
        %three = f32[40]{{0}} fusion(%one.0, %one.1, %one.2), kind=kCustom, calls=%done
        ROOT %other = f32[40]{{0}} {gather.format("%x")}
        """,
        others,
    )
    assert figures.collectives == {"all-gather": Collective(2, 2, 320)}
    assert figures.traffic == {"one": (1, 200.0), "other": (1, 200.0), "two": (1, 64.0)}


def test_all_reduce_scatter_fusion_of_a_tpu():
    figures = program(
        """
        %x = f32[40]{0} parameter(0)
        ROOT %y = f32[10]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
        """,
        """
        %all-reduce-scatter.1 (input: f32[40]) -> f32[10] {
          %input = f32[40]{0:T(128)} parameter(0)
          %sum = f32[40]{0:T(128)} all-reduce(%input), channel_id=20, to_apply=%add
          %table = u32[4]{0:T(128)} constant({...})
          %id = u32[] partition-id()
          %start = u32[1]{0} dynamic-slice(%table, %id), dynamic_slice_sizes={1}
          %at = u32[] bitcast(%start)
          ROOT %part = f32[10]{0:T(128)} dynamic-slice(%sum, %at), dynamic_slice_sizes={10}
        }
        """,
    )
    assert figures.collectives == {"reduce-scatter": Collective(1, 1, 160)}
    assert figures.bytes_accessed == 160 + 40


def test_custom_calls_and_kernels():
    call = "custom-call(%x), custom_call_target="
    figures = program(f"""
        %x = f32[10]{{0}} parameter(0)
        %new = f32[10]{{0}} {call}"AllocateBuffer"
        %flash.3 = f32[10]{{0}} {call}"tpu_custom_call", frontend_attributes={{kernel_metadata={{
        "xprof_metadata":"{{\\"block_q\\": 512}}"
        }}}}, metadata={{op_name="jit(f)/jit(attend)/flash_fwd/flash_fwd/pallas_call" id=3}}
        %again = f32[10]{{0}} {call}"tpu_custom_call", metadata={{op_name="flash_fwd/pallas_call"}}
        ROOT %mine.12 = f32[10]{{0}} {call}"tpu_custom_call"
    """)
    assert figures.custom_calls == {"AllocateBuffer": 1, "tpu_custom_call": 3}
    assert figures.kernels == {"flash_fwd": Kernel(2, 2), "mine": Kernel(1, 1)}
    assert figures.traffic == dict.fromkeys(("flash.3", "again", "mine.12"), (1, 80.0))


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        analyze("module @jit_f {\n}\n")


def test_a_program_compiled_for_four_devices():
    script = """
        import jax, jax.numpy as jnp
        from jax.sharding import PartitionSpec as P

        def layers(weights, h):
            def layer(h, shard):
                h = jnp.tanh(h @ jax.lax.all_gather(shard, "x", axis=0, tiled=True))
                h += jax.lax.psum(h, "x")
                return h, jax.lax.psum_scatter(h, "x", tiled=True)
            return jax.lax.scan(layer, h, weights)

        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = P(None, "x")
        f = jax.shard_map(layers, mesh=mesh, in_specs=(rows, P()), out_specs=(P(), rows),
                          check_vma=False)
        shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((5, 16, 16), (8, 16))]
        print(jax.jit(f).lower(*shapes).compile().as_text())
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = analyze(done.stdout)
    assert figures.collectives == {
        "all-gather": Collective(1, 5, 5 * 16 * 16 * 4),
        "all-reduce": Collective(1, 5, 5 * 8 * 16 * 4),
        "reduce-scatter": Collective(1, 5, 5 * 8 * 16 * 4),
    }
    assert figures.unknown_loops == ()
    # A layer reads h and weights for the product, and each collective its operand, at the least.
    assert 5 * (16 * 16 + 3 * 8 * 16) * 4 < figures.bytes_accessed < 1e5


def test_what_goes_to_other_slices_is_a_send():
    figures = program("""
        %x = f32[10]{0:T(128)} parameter(0)
        %t = token[] after-all()
        %s = (f32[10]{0:T(128)}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true
        %d = token[] send-done(%s), channel_id=1, is_host_transfer=true
        ROOT %y = f32[10]{0:T(128)} negate(%x)
    """)
    assert figures.collectives == {"send": Collective(instructions=1, count=1, bytes=40.0)}


def test_kernels_are_named_before_compilation():
    call = '%1 = stablehlo.custom_call @tpu_custom_call(%0) {{kernel_name = "{}", x = 1}}'
    text = "\n".join([call.format("forward"), call.format("backward"), call.format("forward")])
    assert kernels_of_lowered(text) == {
        "forward": Kernel(2, None), "backward": Kernel(1, None),
    }  # fmt: skip
    assert kernels_of_lowered("%1 = stablehlo.custom_call @Sharding(%0)") == {}
