"""Compiles the training step for TPUs that are not there, and tells what it needs.

Examples:
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4
  python -m ngpt_jax.tools.aot --config=experiments/1b.py:ctx8k --topology=v5p:2x2x4 --search
  python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4 --slices=2 \\
      --config.mesh.data=2 --json=report.json
  python -m ngpt_jax.tools.aot --config=experiments/quickstart.py --topology=local

The step is the very one that training runs, with its mesh, kernels and donation. Needs libtpu
(pip install 'ngpt-jax[tpu]'), no TPU. --topology=local compiles for the devices at hand.
Exit code 1 says that the step does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from absl import flags

from ngpt_jax.config import Config, ConfigError, command, experiment
from ngpt_jax.parallel.backend import enable_x64_if_used, set_xla_flags

_CONFIG = flags.DEFINE_string("config", None, "Experiment FILE[:variant,...].")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:4x4", "Chips as GENERATION:SHAPE, v5e:4x4 or v5p:2x2x4 say; or local."
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that topology.", lower_bound=1)
_WINDOWS = flags.DEFINE_integer(
    "windows",
    None,
    "Windows at one time for each of the mesh.data * mesh.fsdp groups of chips, instead of the"
    " config's batch.",
    lower_bound=1,
)
_SEARCH = flags.DEFINE_bool("search", False, "Find the largest --windows that fits.")
_JSON = flags.DEFINE_string("json", None, "Also write the report to this file.")
_LOWERED = flags.DEFINE_string("lowered", None, "Write the step before compilation to this file.")

GIB = 2**30
# Name of a slice of n chips, as Cloud TPU has it; v4 and v5p are counted in cores.
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


class DoesNotFit(Exception):
    """The compiler needs more memory than a chip has; bytes where it says how many."""

    def __init__(self, peak: float | None):
        super().__init__()
        self.peak = peak


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of a topology ("v5e:4x4"), described by libtpu; none has to exist.

    Raises ConfigError for an unknown topology, and where libtpu is not installed. Sets environment
    variables that libtpu reads, so it has to come before jax is used.
    """
    generation, _, shape = name.partition(":")
    if generation not in _ACCELERATORS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ConfigError(
            f"--topology = {name!r} is not known; it is GENERATION:SHAPE with one of"
            f" {', '.join(_ACCELERATORS)}, for example v5e:4x4, v5p:2x2x4, v6e:8x8."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu is not installed: pip install 'ngpt-jax[tpu]' (no TPU is needed)."
        )
    prefix, cores = _ACCELERATORS[generation]
    chips = math.prod(int(n) for n in shape.split("x"))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{prefix}-{chips * cores}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except Exception as e:  # jaxlib gives a RuntimeError subclass of its own, or a ValueError
        reason = next((line for line in str(e).splitlines() if line), type(e).__name__)
        raise ConfigError(f"--topology = {name!r}: libtpu does not know it ({reason}).") from e


def with_windows(config: Config, devices: int, windows: int) -> Config:
    """The config with a batch of so many windows at one time for each group of chips."""
    from ngpt_jax.parallel.mesh import mesh_shape

    data, fsdp, *_ = mesh_shape(config.mesh, devices)
    batch_size = windows * data * fsdp * config.train.accumulate
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch_size)
    )


def compile_step(
    config: Config, mesh: Any, lowered_to: str | None = None
) -> tuple[Any, Any, float]:
    """The step lowered and compiled, and the seconds that took; raises DoesNotFit."""
    from ngpt_jax.files import write_atomically
    from ngpt_jax.training import layout

    start = time.perf_counter()
    lowered = layout.lower_train_step(config, mesh)
    if lowered_to:
        write_atomically(Path(lowered_to), lowered.as_text())
    try:
        return lowered, lowered.compile(), time.perf_counter() - start
    except Exception as e:  # XlaRuntimeError has no public home
        if "RESOURCE_EXHAUSTED" not in str(e) and "Ran out of memory" not in str(e):
            raise
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([MG])", str(e))
        scale = {"M": 2**20, "G": 2**30}
        raise DoesNotFit(float(used[1]) * scale[used[2]] if used else None) from e


def _facts(config: Config, mesh: Any) -> dict[str, Any]:
    from ngpt_jax.model.params import num_params

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


def analyze(
    config: Config, mesh: Any, lowered: Any, compiled: Any, seconds: float
) -> dict[str, Any]:
    """The figures of a compiled step, JSON-able: bytes, FLOPs and seconds of one chip and step.

    What only the program's text tells is None, and ``unreadable`` says why, where jaxlib cannot
    read what the compiler made (jaxlib 0.10.2 for v5p and v6e on meshes of 16 chips).
    """
    import jax

    from ngpt_jax.aot import hlo
    from ngpt_jax.training import throughput

    program: hlo.Program | None = None
    unreadable: str | None = None
    try:
        program = hlo.analyze(compiled.as_text())
    except jax.errors.JaxRuntimeError as e:
        unreadable = str(e).splitlines()[0]
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    chip = throughput.chip_of(mesh.devices.flat[0])
    tokens = config.train.batch_size * config.model.context / mesh.size
    model_flops = tokens * throughput.train_flops_per_token(config.model)
    flops = model_flops + tokens * throughput.recomputed_flops_per_token(config.model)
    kernels = program.kernels if program else hlo.kernels_of_lowered(lowered.as_text())
    report: dict[str, Any] = _facts(config, mesh) | {
        "attention_kernels": kernels,
        "custom_calls": program and program.custom_calls,
        "compile_seconds": seconds,
        "fits": True,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "unreadable": unreadable,
        "collectives": None,
        "collective_bytes": None,
        "bytes_accessed": None,
        "bytes_accessed_loops_once": cost.get("bytes accessed"),
        "unknown_loops": None,
        "model_flops": model_flops,
        "flops": flops,
        "arithmetic_intensity": None,
    }
    if program:
        report |= {
            "collectives": {k: dataclasses.asdict(c) for k, c in program.collectives.items()},
            "collective_bytes": sum(c.bytes for c in program.collectives.values()),
            "bytes_accessed": program.bytes_accessed,
            "unknown_loops": list(program.unknown_loops),
            "arithmetic_intensity": flops / program.bytes_accessed,
        }
    if chip is not None:
        limits = {"compute": flops / chip.flops}
        if program:
            limits |= {
                "memory": program.bytes_accessed / chip.bandwidth,
                "network": sum(c.bytes for k, c in program.collectives.items() if k != "send")
                / chip.network,  # of a slice; that between slices is a matter of the place
            }
        step = max(limits.values())
        report |= {
            "chip_bytes": chip.memory * GIB,
            "least_seconds": limits,
            "step_seconds_bound": step,
            "bound_by": max(limits, key=lambda k: limits[k]),
            "mfu_bound": model_flops / (step * chip.flops),
            "tokens_per_second_bound": tokens * mesh.size / step,
        }
    return report


def show(report: dict[str, Any]) -> str:
    """The report as a table of two columns."""
    from ngpt_jax.terminal import format_bytes

    mesh = " x ".join(f"{a} {n}" for a, n in report["mesh"].items() if n > 1) or "one device"
    rows = [
        ("model", f"{report['model']}, {report['parameters']:,} parameters"),
        ("devices", f"{report['chips']} x {report['device_kind']}, mesh {mesh}"),
        ("batch", f"{report['batch_size']} windows of {report['context']:,} tokens in"
         f" {report['microbatches']} microbatches, {report['windows_per_chip']:g} windows a chip"),
    ]  # fmt: skip
    if not report["fits"]:
        need = report["peak_bytes"] and f"needs {format_bytes(report['peak_bytes'])} a chip"
        has = report["chip_bytes"] and f"the chip has {report['chip_bytes'] / GIB:g} GiB"
        told = ", ".join(x for x in (need, has) if x)
        rows.append(("memory", "DOES NOT FIT" + (f": {told}" if told else "")))
        return _columns(rows)
    kernels = sum(report["attention_kernels"].values())
    of = f" of {report['chip_bytes'] / GIB:g} GiB" if "chip_bytes" in report else ""
    rows += [
        ("peak memory a chip", f"{report['peak_bytes'] / GIB:.3f} GiB{of}: state"
         f" {format_bytes(report['argument_bytes'])}, temporary"
         f" {format_bytes(report['temporary_bytes'])}"),
        ("attention", f"{report['attention']}, {kernels} Pallas calls in the program; remat"
         f" {report['remat']}"),
        ("compiled in", f"{report['compile_seconds']:.0f} s"),
    ]  # fmt: skip
    for kind, c in (report["collectives"] or {}).items():
        times = f"{c['instructions']} instructions, {c['count']} a step"
        name = "send to other slices" if kind == "send" else kind
        rows.append((name, f"{times}, {format_bytes(c['bytes'])}"))
    loops_once = f"(XLA's count, loops once: {report['bytes_accessed_loops_once'] or math.nan:.3g})"
    flops = f"{report['flops']:.3g}, {report['model_flops']:.3g} of them the model's"
    if report["unreadable"]:
        rows += [
            ("collectives, bytes", "not known: jaxlib cannot read this compiler's program, a newer"
             f" one may {loops_once}"),
            ("FLOPs a chip", flops),
        ]  # fmt: skip
    else:
        rows += [
            ("bytes accessed", f"{report['bytes_accessed']:.3g} {loops_once}"),
            ("FLOPs a chip", f"{flops}; {report['arithmetic_intensity']:.0f} a byte"),
        ]
    if "mfu_bound" in report:
        least = ", ".join(f"{k} {1e3 * s:.0f} ms" for k, s in report["least_seconds"].items())
        by = "published peaks and perfect overlap"
        by += ", memory and network left out" if report["unreadable"] else ""
        rows += [
            ("least time", least),
            ("estimate", f"at least {1e3 * report['step_seconds_bound']:.0f} ms a step"
             f" ({report['bound_by']}), at most {report['tokens_per_second_bound']:,.0f} tokens/s,"
             f" MFU at most {report['mfu_bound']:.0%}, by {by}"),
        ]  # fmt: skip
    return _columns(rows)


def _columns(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def report_of(config: Config, devices: list[Any], lowered_to: str | None = None) -> dict[str, Any]:
    """Compiles a step for devices and reports on it, also where it does not fit.

    Raises ConfigError where the config is wrong for the devices, and where attention=auto did not
    find its kernel on TPUs.
    """
    from ngpt_jax.parallel.mesh import make_mesh
    from ngpt_jax.training import layout, throughput

    mesh = make_mesh(config, devices)
    asked = config.model.attention
    config, why = layout.for_mesh(config, mesh)
    if asked == "auto" and config.model.attention == "xla" and devices[0].platform == "tpu":
        raise ConfigError(
            f"{why}: whole attention scores in memory. Mend that, or set model.attention=xla."
        )
    try:
        step = compile_step(config, mesh, lowered_to)
    except DoesNotFit as e:
        chip = throughput.chip_of(devices[0])
        limit = chip.memory * GIB if chip is not None else None
        return _facts(config, mesh) | {"fits": False, "peak_bytes": e.peak, "chip_bytes": limit}
    return analyze(config, mesh, *step)


USABLE = 0.97  # of a chip's memory; the rest is the runtime's


def search(config: Config, devices: list[Any]) -> dict[str, Any]:
    """The report of the largest number of windows that fits; says what it tries.

    Peak memory is close to a line in the number of windows. The first try comes from an estimate
    of the line, the next from the line through what was measured; the search ends where one more
    window was seen, or is calculated, not to fit.
    """
    from ngpt_jax.training import throughput

    chip = throughput.chip_of(devices[0])
    if chip is None:
        raise ConfigError(f"The memory of {devices[0].device_kind} is not known: no --search.")
    limit = USABLE * chip.memory * GIB
    state, of_a_window = _estimate(config, len(devices))
    fitting, failing = 0, math.inf
    best: dict[str, Any] | None = None
    peaks = {0: state}
    windows = max(1, int((limit - state) / of_a_window))
    while True:
        report = report_of(with_windows(config, len(devices), windows), devices)
        peak = report["peak_bytes"]
        told = "" if peak is None else f"{peak / GIB:.2f} GiB of {chip.memory:g}, "
        fits = report["fits"] and (peak is None or peak <= limit)
        print(f"{windows} windows: {told}{'fits' if fits else 'no'}", flush=True)
        if fits:
            fitting, best = windows, report
        else:
            failing = windows
        if peak is None:  # the compiler did not say by how much: halve what is left
            windows = (fitting + int(failing)) // 2
            if windows == fitting:
                return best or report
            continue
        peaks[windows] = peak
        (a, low), (b, high) = sorted(peaks.items())[-2:]
        guess = int(b + (limit - high) * (b - a) / (high - low)) if high > low else 0
        windows = int(min(max(guess, fitting), failing - 1))
        if windows <= fitting:
            return best or report


def _estimate(config: Config, devices: int) -> tuple[float, float]:
    """Bytes of a chip that do not depend on the batch, and those of a window; roughly."""
    from ngpt_jax.model.params import num_params
    from ngpt_jax.parallel.mesh import mesh_shape

    m = config.model
    assert m.mlp_width is not None
    _, fsdp, tensor, context = mesh_shape(config.mesh, devices)
    # Master weights and moments in float32, weights and gradients in bfloat16; 5 activations of
    # the MLP and some 14 of the width in the block at work, and one a block that waits for it.
    state = 16 * num_params(m) / (fsdp * tensor) + 0.1 * GIB
    token = 2 * (5 * m.mlp_width / tensor + 14 * m.width)
    kept = {"full": 1, "attention": 2, "dots": 6 + 2 * m.mlp_width / m.width, "none": 30}[m.remat]
    return state, m.context / context * (token + 2 * kept * m.layers * m.width)


def _main(overrides: list[tuple[str, str]]) -> int:
    if _CONFIG.value is None:
        raise ConfigError("Give an experiment: --config=experiments/1b.py (see --help).")
    command.check_output(json=_JSON.value, lowered=_LOWERED.value)
    if _SEARCH.value and (_WINDOWS.value or _LOWERED.value):
        raise ConfigError(
            "--search finds --windows itself and compiles many steps: leave out"
            " --windows and --lowered."
        )
    if _TOPOLOGY.value == "local" and _SLICES.value > 1:
        raise ConfigError("--slices is for TPU topologies; --topology=local has its own devices.")
    config = experiment.load_config(_CONFIG.value, overrides)
    set_xla_flags(config.runtime.xla_flags)
    if _TOPOLOGY.value == "local":
        import jax

        devices = jax.devices()
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this machine's own devices play no part
        devices = topology_devices(_TOPOLOGY.value, _SLICES.value)
    from ngpt_jax.data.tokenizers.load import with_tokenizer
    from ngpt_jax.files import write_atomically

    enable_x64_if_used(config.model)
    if config.model.vocab_size is None:
        config, _ = with_tokenizer(config)
    if _SEARCH.value:
        report = search(config, devices)
    else:
        if _WINDOWS.value:
            config = with_windows(config, len(devices), _WINDOWS.value)
        report = report_of(config, devices, _LOWERED.value)
    print(show(report))
    if _JSON.value:
        write_atomically(Path(_JSON.value), json.dumps(report, indent=2) + "\n")
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    command.run_command(_main)
