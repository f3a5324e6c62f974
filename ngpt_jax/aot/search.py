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
    estimate of that line, each later one from the line through two sizes that were tried. The
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
    best: dict[str, Any] | None = None
    fitted: dict[int, float] = {0: state}  # peaks
    failing, over = math.inf, None
    count = max(1, int((limit - state) / of_a_sequence))
    while True:
        report = report_lib.report_of(with_sequences(config, len(devices), count), devices)
        peak = report["peak_bytes"]
        needed = "" if peak is None else f"{peak / GIB:.2f} GiB of {limit / GIB:.2f}, "
        fits = report["fits"] and (peak is None or peak <= limit)
        print(f"{count} sequences: {needed}{'fits' if fits else 'no'}", flush=True)
        if fits:
            fitted[count], best = peak, report
        else:
            failing, over = count, peak
        count = _next_size(fitted, failing, over, limit)
        if count <= max(fitted):
            return best or report | {"fits": False}


def _next_size(fitted: dict[int, float], failing: float, over: float | None, limit: float) -> int:
    """How many sequences to try next; no more than fit where the search is at its end.

    Above some memory XLA computes again to save some. The peaks of what does not fit are flat there
    or even fall, so a line never goes through two of them.

    Args:
      fitted: peaks by number of sequences, 0 among them.
      failing: the least number that did not fit, or infinity.
      over: its peak, where the compiler says it.
      limit: bytes.
    """
    most, low = max(fitted.items())
    before, lower = max((item for item in fitted.items() if item[0] < most), default=(0, low))
    if before:  # both were tried: the line goes on, up to what fits
        guess = _on_line((before, lower), (most, low), limit)
        return int(max(min(guess, 2 * most, failing - 1), most))
    if failing == math.inf:
        guess = _on_line((before, lower), (most, low), limit)
        return int(max(min(guess, 2 * most), most + 1))  # the peak of 0 is an estimate
    if over is None:
        return (most + int(failing)) // 2
    guess = _on_line((most, low), (int(failing), over), limit)
    return int(min(max(guess, most + 1), failing - 1))


def _on_line(a: tuple[int, float], b: tuple[int, float], limit: float) -> float:
    """The number whose peak is the limit, on the line through two (number, peak)."""
    rise = (b[1] - a[1]) / (b[0] - a[0])
    return a[0] + (limit - a[1]) // rise if rise > 0 else math.inf
