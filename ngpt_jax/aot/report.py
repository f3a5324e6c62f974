"""The training step compiled for given devices, and what it needs: memory, traffic, time.

And the largest batch whose step still fits into the memory of a chip.
"""

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ngpt_jax.aot import hlo
from ngpt_jax.aot.topologies import GPU_COMPILER_OPTIONS
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.files import write_atomically
from ngpt_jax.model.params import num_params
from ngpt_jax.parallel.mesh import make_mesh, mesh_shape
from ngpt_jax.terminal import format_bytes
from ngpt_jax.training import layout, throughput

GIB = 2**30
LEAST_STEP = 1e-3  # seconds; starting a step takes some of it, so no bound below says anything
USABLE = 0.97  # of a chip's memory; the rest is the runtime's


class CompiledStep(NamedTuple):
    lowered: jax.stages.Lowered
    compiled: Any  # a jax.stages.Compiled
    seconds: float  # of lowering and compiling


def compile_step(config: Config, mesh: Mesh, lowered_to: str | None = None) -> CompiledStep:
    """Compiles the training step for a mesh.

    Args:
      config: resolved, with its vocabulary and kernel decided (layout.for_mesh).
      mesh: of devices that need not exist.
      lowered_to: a file to which the StableHLO text of the step is written.
    """
    start = time.perf_counter()
    lowered = layout.lower_train_step(config, mesh)
    if lowered_to:
        write_atomically(Path(lowered_to), lowered.as_text())
    gpu = mesh.devices.flat[0].platform == "gpu"
    compiled = lowered.compile(GPU_COMPILER_OPTIONS if gpu else None)
    return CompiledStep(lowered, compiled, time.perf_counter() - start)


def report_of(config: Config, devices: list[Any], lowered_to: str | None = None) -> dict[str, Any]:
    """Compiles the training step for devices and reports on it, also where it does not fit.

    Returns:
      What :func:`analyze` returns, or where the step does not fit "fits" (False), "peak_bytes" and
      "chip_bytes", None where not known, beside the facts of the run.

    Raises ConfigError where the config is wrong for the devices, and where attention=auto does not
    find its kernel on TPUs.
    """
    mesh = make_mesh(config, devices)
    asked = config.model.attention
    config, why = layout.for_mesh(config, mesh)
    if asked == "auto" and config.model.attention == "xla" and devices[0].platform == "tpu":
        raise ConfigError(
            f"{why}: it keeps whole attention scores in memory. Remove the reason, or set"
            " model.attention=xla."
        )
    try:
        step = compile_step(config, mesh, lowered_to)
    except Exception as e:  # XlaRuntimeError has no public home
        if "RESOURCE_EXHAUSTED" not in str(e) and "Ran out of memory" not in str(e):
            raise
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([MG])", str(e))
        peak = float(used[1]) * {"M": 2**20, "G": GIB}[used[2]] if used else None
        chip = throughput.chip_of(devices[0])
        limit = chip.memory * GIB if chip is not None else None
        return run_facts(config, mesh) | {"fits": False, "peak_bytes": peak, "chip_bytes": limit}
    return analyze(config, mesh, step)


def run_facts(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What is known before compilation: model, batch, mesh."""
    return {
        "model": config.model.kind,
        "parameters": num_params(config.model),
        "context": config.model.context,
        "batch_size": config.train.batch_size,
        "microbatches": config.train.accumulate,
        "windows_per_chip": config.train.batch_size / config.train.accumulate / mesh.size,
        "mesh": dict(mesh.shape),
        "chips": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "remat": config.model.remat,
        "attention": config.model.attention,
    }


def analyze(config: Config, mesh: Mesh, step: CompiledStep) -> dict[str, Any]:
    """The figures of a compiled step, JSON-able: bytes, FLOPs and seconds of one chip and step.

    What only the program's text tells is None where jaxlib cannot read what the compiler made
    (jaxlib 0.10.2 for v5p and v6e on meshes of 16 chips); ``unreadable`` then gives the reason.
    """
    program: hlo.Program | None = None
    unreadable: str | None = None
    try:
        program = hlo.analyze(step.compiled.as_text())
    except jax.errors.JaxRuntimeError as e:
        unreadable = str(e).splitlines()[0]
    kernels = program.kernels if program else hlo.kernels_of_lowered(step.lowered.as_text())
    memory = step.compiled.memory_analysis()
    tokens = config.train.batch_size * config.model.context / mesh.size
    model_flops = tokens * throughput.train_flops_per_token(config.model)
    flops = model_flops + tokens * throughput.recomputed_flops_per_token(config.model)
    report = run_facts(config, mesh) | {
        "attention_kernels": kernels,
        "custom_calls": program and program.custom_calls,
        "compile_seconds": step.seconds,
        "fits": True,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "unreadable": unreadable,
        "collectives": program
        and {kind: dataclasses.asdict(c) for kind, c in program.collectives.items()},
        "collective_bytes": program and sum(c.bytes for c in program.collectives.values()),
        "bytes_accessed": program and program.bytes_accessed,
        "bytes_accessed_loops_once": (step.compiled.cost_analysis() or {}).get("bytes accessed"),
        "unknown_loops": program and list(program.unknown_loops),
        "model_flops": model_flops,
        "flops": flops,
        "arithmetic_intensity": program and flops / program.bytes_accessed,
    }
    chip = throughput.chip_of(mesh.devices.flat[0])
    if chip is None:
        return report
    limits = {"compute": flops / chip.flops}
    if program:
        limits["memory"] = program.bytes_accessed / chip.bandwidth
        # Inside a slice; how fast the network between slices is depends on the place.
        inside = sum(c.bytes for kind, c in program.collectives.items() if kind != "send")
        limits["network"] = inside / chip.network
    bound_by = max(limits, key=lambda name: limits[name])
    return report | {
        "chip_bytes": chip.memory * GIB,
        "least_seconds": limits,
        "step_seconds_bound": limits[bound_by],
        "bound_by": bound_by,
        "mfu_bound": model_flops / (limits[bound_by] * chip.flops),
        "tokens_per_second_bound": tokens * mesh.size / limits[bound_by],
    }


def with_sequences(config: Config, devices: int, count: int) -> Config:
    """The config with a microbatch of ``count`` sequences for each mesh.data * mesh.fsdp group."""
    data, fsdp, *_ = mesh_shape(config.mesh, devices)
    batch_size = count * data * fsdp * config.train.accumulate
    train = dataclasses.replace(config.train, batch_size=batch_size)
    return dataclasses.replace(config, train=train)


def search(config: Config, devices: list[Any]) -> dict[str, Any]:
    """The report of the largest number of sequences that fits; prints what it tries.

    Peak memory is nearly a straight line in the number of sequences. The first try comes from an
    estimate of that line, each later one from the line through the two largest sizes measured. The
    search ends where one more sequence was seen, or calculated, not to fit.
    """
    chip = throughput.chip_of(devices[0])
    if chip is None:
        raise ConfigError(
            f"--search: the memory of {devices[0].device_kind} is not known; give --windows."
        )
    limit = USABLE * chip.memory * GIB
    state, of_a_sequence = _estimate(config, len(devices))
    fitting, failing = 0, math.inf
    best: dict[str, Any] | None = None
    peaks = {0: state}
    count = max(1, int((limit - state) / of_a_sequence))
    while True:
        report = report_of(with_sequences(config, len(devices), count), devices)
        peak = report["peak_bytes"]
        needed = "" if peak is None else f"{peak / GIB:.2f} GiB of {chip.memory:g}, "
        fits = report["fits"] and (peak is None or peak <= limit)
        print(f"{count} sequences: {needed}{'fits' if fits else 'no'}", flush=True)
        if fits:
            fitting, best = count, report
        else:
            failing = count
        if peak is None:  # the compiler did not say by how much: halve what is left
            count = (fitting + int(failing)) // 2
        else:
            peaks[count] = peak
            (a, low), (b, high) = sorted(peaks.items())[-2:]
            guess = int(b + (limit - high) * (b - a) / (high - low)) if high > low else 0
            count = int(min(max(guess, fitting), failing - 1))
        if count <= fitting:
            return best or report


def _estimate(config: Config, devices: int) -> tuple[float, float]:
    """Bytes of a chip that do not depend on the batch, and bytes of a sequence; roughly."""
    m = config.model
    assert m.mlp_width is not None
    _, fsdp, tensor, context = mesh_shape(config.mesh, devices)
    # Master weights and moments in float32, weights and gradients in bfloat16; the block being
    # computed keeps 5 activations of the MLP's width and some 14 of the model's, the others one.
    state = 16 * num_params(m) / (fsdp * tensor) + 0.1 * GIB
    token = 2 * (5 * m.mlp_width / tensor + 14 * m.width)
    kept = {"full": 1, "attention": 2, "dots": 6 + 2 * m.mlp_width / m.width, "none": 30}[m.remat]
    return state, m.context / context * (token + 2 * kept * m.layers * m.width)


def show(report: dict[str, Any]) -> str:
    """The report as a table of two columns."""
    rows = _rows(report)
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def _rows(report: dict[str, Any]) -> dict[str, str]:
    r, peak = report, report["peak_bytes"]
    mesh = " x ".join(f"{a} {n}" for a, n in r["mesh"].items() if n > 1) or "one device"
    rows = {
        "model": f"{r['model']}, {r['parameters']:,} parameters",
        "devices": f"{r['chips']} x {r['device_kind']}, mesh {mesh}",
        "batch": f"{r['batch_size']} sequences of {r['context']:,} tokens in {r['microbatches']}"
        f" microbatches, {r['windows_per_chip']:g} sequences a chip",
    }
    if not r["fits"]:
        need = peak and f"needs {format_bytes(peak)} a chip"
        has = r["chip_bytes"] and f"the chip has {r['chip_bytes'] / GIB:g} GiB"
        known = ", ".join(filter(None, (need, has)))
        rows["memory"] = "DOES NOT FIT" + (known and f": {known}")
        return rows
    of = f" of {r['chip_bytes'] / GIB:g} GiB" if "chip_bytes" in r else ""
    kernels = sum(r["attention_kernels"].values())
    rows |= {
        "peak memory a chip": f"{format_bytes(peak)}{of}: state"
        f" {format_bytes(r['argument_bytes'])}, temporary {format_bytes(r['temporary_bytes'])}",
        "attention": f"{r['attention']}, {kernels} Pallas calls in the program; remat {r['remat']}",
        "compiled in": f"{r['compile_seconds']:.0f} s",
    }
    for kind, c in (r["collectives"] or {}).items():
        rows["send to other slices" if kind == "send" else kind] = (
            f"{c['instructions']} instructions, {c['count']} a step, {format_bytes(c['bytes'])}"
        )
    loops_once = f"(XLA's count, loops once: {r['bytes_accessed_loops_once'] or math.nan:.3g})"
    flops = f"{r['flops']:.3g}, {r['model_flops']:.3g} of them the model's"
    if r["unreadable"]:
        rows["collectives, bytes"] = (
            f"not known: jaxlib cannot read this compiler's program, a newer one may {loops_once}"
        )
        rows["FLOPs a chip"] = flops
    else:
        rows["bytes accessed"] = f"{r['bytes_accessed']:.3g} {loops_once}"
        rows["FLOPs a chip"] = f"{flops}; {r['arithmetic_intensity']:.0f} a byte"
    if "mfu_bound" in r:
        least = (f"{name} {_format_seconds(s)}" for name, s in r["least_seconds"].items())
        rows["least time"] = ", ".join(least)
        rows["estimate"] = (
            f"at least {_format_seconds(r['step_seconds_bound'])} a step ({r['bound_by']}), at most"
            f" {r['tokens_per_second_bound']:,.0f} tokens/s, MFU at most {r['mfu_bound']:.0%}, by"
            " published peaks and perfect overlap"
            + (", memory and network left out" if r["unreadable"] else "")
            if r["step_seconds_bound"] >= LEAST_STEP
            else "none: the model is so small that starting a step takes longer than its work"
        )
    return rows


def _format_seconds(seconds: float) -> str:
    """Such as 1.35 s, 120 ms or 35.1 µs."""
    size, unit = next((u for u in ((1, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "µs"))
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
