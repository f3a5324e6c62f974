"""The largest batch whose training step fits into the memory of a device."""

import dataclasses
import math
from typing import Any

from ngpt_jax.aot import report as report_lib
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.parallel import rules
from ngpt_jax.parallel.mesh import mesh_shape
from ngpt_jax.parallel.rules import MESH_AXES
from ngpt_jax.training import choices, throughput
from ngpt_jax.training.throughput import GIB


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
    limit = throughput.usable_share(devices[0].platform) * chip.memory * GIB
    if config.model.remat == "auto":  # with full remat the most sequences fit
        model = dataclasses.replace(config.model, remat="full")
        config = dataclasses.replace(config, model=model)
    state, of_a_sequence = choices.estimate(
        with_sequences(config, len(devices), 1),
        dict(zip(MESH_AXES, mesh_shape(config.mesh, len(devices)))),
        rules.platform_of(devices[0]),
        chip.memory * GIB,
    )
    fitting, failing = 0, math.inf
    best: dict[str, Any] | None = None
    peaks = {0: state}
    count = max(1, int((limit - state) / of_a_sequence))
    while True:
        report = report_lib.report_of(with_sequences(config, len(devices), count), devices)
        peak = report["peak_bytes"]
        needed = "" if peak is None else f"{peak / GIB:.2f} GiB of {limit / GIB:.2f}, "
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
            # Above some memory XLA computes again to save some: the line grows flat.
            count = int(min(max(guess, fitting), failing - 1, 2 * b))
        if count <= fitting:
            return best or report | {"fits": False}
