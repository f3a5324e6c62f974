"""What a compiled program needs: memory, traffic, kernels, collectives, and bounds on its time."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from ngpt_jax.aot import hlo, hlo_parts
from ngpt_jax.aot.programs import Compiled, Texts, compile_generation, compile_step
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.decoding.cache import CHUNK
from ngpt_jax.errors import is_out_of_memory
from ngpt_jax.model.attention import kernel_of
from ngpt_jax.model.params import num_params
from ngpt_jax.parallel import rules
from ngpt_jax.parallel.mesh import device_mesh, make_mesh
from ngpt_jax.training import layout, throughput
from ngpt_jax.training.throughput import GIB

_LARGEST = 10  # instructions in the report


def report_of(
    config: Config,
    devices: list[Any],
    lowered_to: str | None = None,
    program: str = "train",
    texts: Texts | None = None,
) -> dict[str, Any]:
    """Compiles a program for devices and reports on it, also where it does not fit.

    Args:
      config: resolved, with its vocabulary.
      devices: that need not exist.
      lowered_to: a file to which the StableHLO text of the program is written.
      program: "train", or "prefill" or "decode" of ``texts``.

    Returns:
      What :func:`analyze` returns, or where the compiler finds that the program does not fit
      "fits" (False), "peak_bytes" and "chip_bytes", None where not known, beside the facts of the
      run.

    Raises ConfigError where the config is wrong for the devices, and where attention=auto does not
    find its kernel on TPUs.
    """
    try:
        if program != "train":
            assert texts is not None
            mesh = device_mesh(config.mesh, devices)
            facts = run_facts(config, mesh, program, texts)
            step = compile_generation(program, config, mesh, texts, lowered_to)
            return analyze(config, mesh, step, program, texts)
        mesh = make_mesh(config, devices)
        asked = config.model.attention
        config, told = layout.for_mesh(config, mesh)
        if asked == "auto" and config.model.attention == "xla" and devices[0].platform == "tpu":
            raise ConfigError(
                f"model.attention: {told['attention']}: it keeps whole attention scores in memory."
                " Remove the reason, or set model.attention=xla."
            )
        facts = run_facts(config, mesh)
        return analyze(config, mesh, compile_step(config, mesh, lowered_to))
    except Exception as e:  # XlaRuntimeError has no public home
        if not is_out_of_memory(e):
            raise
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([MG])", str(e))
        peak = float(used[1]) * {"M": 2**20, "G": GIB}[used[2]] if used else None
        chip = throughput.chip_of(devices[0])
        limit = chip.memory * GIB if chip is not None else None
        return facts | {"fits": False, "peak_bytes": peak, "chip_bytes": limit}


def run_facts(
    config: Config, mesh: Mesh, program: str = "train", texts: Texts | None = None
) -> dict[str, Any]:
    """What is known before compilation: model, batch or texts, mesh."""
    device = mesh.devices.flat[0]
    facts: dict[str, Any] = {
        "program": program,
        "model": config.model.kind,
        "parameters": num_params(config.model),
        "context": config.model.context,
        "mesh": dict(mesh.shape),
        "chips": mesh.size,
        "hosts": len({d.process_index for d in mesh.devices.flat}),
        "platform": device.platform,
        "device_kind": device.device_kind,
    }
    if texts is not None:
        with jax.set_mesh(mesh):
            kernel = kernel_of(config.model, texts.width) if program == "prefill" else "xla"
        return facts | {**texts._asdict(), "slots": texts.slots, "attention": kernel}
    return facts | {
        "batch_size": config.train.batch_size,
        "microbatches": config.train.accumulate,
        "windows_per_chip": config.train.batch_size / config.train.accumulate / mesh.size,
        "remat": config.model.remat,
        "scan_layers": config.model.scan_layers,
        "loss_chunk": config.model.loss_chunk,
        "model_kernels": config.model.kernels,
        "attention": config.model.attention,
    }


def analyze(
    config: Config,
    mesh: Mesh,
    step: Compiled,
    program: str = "train",
    texts: Texts | None = None,
) -> dict[str, Any]:
    """The figures of a compiled program, JSON-able: bytes, FLOPs and seconds of one device.

    Those of training are of a step, those of "decode" of a token of each row; what that program
    does besides, once for at most CHUNK tokens, is "outside_loop".

    What only the program's text tells is None where jaxlib cannot read what the compiler made
    (jaxlib 0.10.2 for v5p and v6e on meshes of 16 chips); ``unreadable`` then gives the reason.
    """
    found: hlo.Program | None = None
    unreadable: str | None = None
    outside: dict[str, float] | None = None
    gpu = mesh.devices.flat[0].platform == "gpu"
    hosts = [d.process_index for d in mesh.devices.flat] if gpu else []
    hosts = hosts if len(set(hosts)) > 1 else []
    try:
        text = step.compiled.as_text()
        found = hlo.analyze(text, hosts, one_pass=program == "decode")
        if program == "decode":
            whole = hlo.analyze(text)
            outside = {
                "bytes": whole.bytes_accessed - found.bytes_accessed,
                "launches": whole.launches - found.launches,
                "tokens": CHUNK,
            }
    except jax.errors.JaxRuntimeError as e:
        unreadable = str(e).splitlines()[0]
    kernels = found.kernels if found else hlo.kernels_of_lowered(step.lowered.as_text())
    memory = step.compiled.memory_analysis()
    tokens, model_flops, flops = _work(config, mesh, program, texts)
    peak = memory.peak_memory_in_bytes
    if gpu or not peak:  # a GPU's temporaries are one piece of memory, gaps included
        peak = max(peak, _allocated(memory))
    report = run_facts(config, mesh, program, texts) | {
        "kernels": {name: dataclasses.asdict(k) for name, k in kernels.items()},
        "launches": found and found.launches if gpu else None,
        "custom_calls": found and found.custom_calls,
        "compile_seconds": step.seconds,
        "fits": True,
        "peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "unreadable": unreadable,
        "collectives": found
        and {kind: dataclasses.asdict(c) for kind, c in found.collectives.items()},
        "collective_bytes": found and sum(c.bytes for c in found.collectives.values()),
        "bytes_accessed": found and found.bytes_accessed,
        "bytes_accessed_loops_once": (step.compiled.cost_analysis() or {}).get("bytes accessed"),
        "outside_loop": outside,
        "unknown_loops": found and list(found.unknown_loops),
        "parts": found and {n: part._asdict() for n, part in hlo_parts.by_part(found).items()},
        "largest": found and hlo_parts.largest(found, _LARGEST),
        "model_flops": model_flops,
        "flops": flops,
        "arithmetic_intensity": found and flops / found.bytes_accessed,
    }
    chip = throughput.chip_of(mesh.devices.flat[0])
    if chip is None:
        return report
    report |= {
        "chip_bytes": chip.memory * GIB,
        "usable": throughput.usable_share(mesh.devices.flat[0].platform),
    }
    if gpu:  # XLA compiles programs for GPUs that need more memory than they have
        report["fits"] = peak <= chip.memory * GIB
    limits = {"compute": flops / chip.flops}
    if found:
        limits["memory"] = found.bytes_accessed / chip.bandwidth
        # Inside a slice or a host; how fast the network between them is depends on the place.
        inside = sum(c.bytes - c.across for k, c in found.collectives.items() if k != "send")
        limits["network"] = inside / chip.network
    return report | _bounds(limits, model_flops, chip.flops, tokens)


def _bounds(
    limits: Mapping[str, float], model_flops: float, peak: float, tokens: float
) -> dict[str, Any]:
    """Bounds on a program's time: all at once, and one after another.

    Args:
      limits: the least seconds by resource.
      model_flops: of one device.
      peak: FLOP/s of one device.
      tokens: of all devices.
    """
    bound_by = max(limits, key=lambda name: limits[name])
    total = sum(limits.values())
    return {
        "least_seconds": limits,
        "step_seconds_bound": limits[bound_by],
        "step_seconds_sum": total,
        "bound_by": bound_by,
        "mfu_bounds": {name: model_flops / (s * peak) if s else None for name, s in limits.items()},
        "mfu_bound": model_flops / (limits[bound_by] * peak),
        "mfu_sum": model_flops / (total * peak),
        "tokens_per_second_bound": tokens / limits[bound_by],
        "tokens_per_second_sum": tokens / total,
    }


def _work(
    config: Config, mesh: Mesh, program: str, texts: Texts | None
) -> tuple[float, float, float]:
    """Tokens of all devices; FLOPs of the model, and with those done again, of one device."""
    m = config.model
    if texts is None:
        tokens = config.train.batch_size * m.context
        model_flops = tokens / mesh.size * throughput.train_flops_per_token(m)
        again = tokens / mesh.size * throughput.recomputed_flops_per_token(m)
        return tokens, model_flops, model_flops + again
    length, of_a_row = 1, throughput.decode_flops(m, texts.slots)
    if program == "prefill":
        length, of_a_row = texts.prompt, throughput.prefill_flops(m, texts.prompt)
    # Rows that do not divide are whole on every device.
    shape = (texts.rows, texts.width if program == "prefill" else 1)
    placed = NamedSharding(mesh, rules.activation_spec(("batch", "length"), shape, mesh))
    rows, width = placed.shard_shape(shape)
    share = rows * width / shape[1] / rules.axis_size(mesh, "tensor")
    return texts.rows * length, share * of_a_row, share * of_a_row


def _allocated(memory: Any) -> int:
    """Bytes of arguments, temporaries, and results that do not lie in arguments."""
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + max(own, 0)
