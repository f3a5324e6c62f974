"""The report of a program as text: rows of names and figures, then two tables."""

from typing import Any

from ngpt_jax.terminal import format_bytes, format_table
from ngpt_jax.training.throughput import FRACTION, GIB

LEAST_STEP = 1e-3  # seconds; starting a step takes some of it, so no bound below says anything
_OF = {"train": "a step", "prefill": "a prefill", "decode": "a token"}


def show(report: dict[str, Any]) -> str:
    """The report as text."""
    rows = _rows(report)
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {text}" for name, text in rows.items()]
    if report.get("parts"):
        lines += ["", _parts(report), "", _largest(report)]
    return "\n".join(lines)


def _rows(r: dict[str, Any]) -> dict[str, str]:
    mesh = " x ".join(f"{a} {n}" for a, n in r["mesh"].items() if n > 1) or "one device"
    hosts = f" on {r['hosts']} hosts" if r["hosts"] > 1 else ""
    rows = {
        "program": r["program"],
        "model": f"{r['model']}, {r['parameters']:,} parameters",
        "devices": f"{r['chips']} x {r['device_kind']}{hosts}, mesh {mesh}",
    }
    if r["program"] == "train":
        rows["batch"] = (
            f"{r['batch_size']} sequences of {r['context']:,} tokens in {r['microbatches']}"
            f" microbatches, {r['windows_per_chip']:g} sequences a device"
        )
    else:
        rows["texts"] = (
            f"{r['rows']} rows, prompts of {r['prompt']:,} tokens, {r['tokens']:,} to generate, a"
            f" cache of {r['slots']:,} slots"
        )
    if "temporary_bytes" not in r or not r["fits"]:
        peak = r["peak_bytes"]
        need = peak and f"needs {format_bytes(peak)} a device"
        has = r["chip_bytes"] and f"the device has {r['chip_bytes'] / GIB:.4g} GiB"
        known = ", ".join(filter(None, (need, has)))
        rows["memory"] = "DOES NOT FIT" + (known and f": {known}")
        if "temporary_bytes" not in r:
            return rows
    else:
        rows["memory a device"] = _memory(r)
    rows["attention"] = r["attention"]
    if "remat" in r:
        layers = "scanned" if r["scan_layers"] else "unrolled"
        rows["layers"] = (
            f"{layers}, remat {r['remat']}, model.kernels {r['model_kernels']}, loss in chunks of"
            f" {r['loss_chunk']:,} tokens"
        )
    rows["kernels by name"] = _kernels(r)
    if r["launches"] is not None:
        rows["kernels launched"] = f"{r['launches']:,} {_OF[r['program']]}"
    tuned = "; autotuning off, as no device measures kernels" if r["platform"] == "gpu" else ""
    rows["compiled in"] = f"{r['compile_seconds']:.0f} s{tuned}; nothing ran"
    return rows | _traffic(r) | _times(r)


def _memory(r: dict[str, Any]) -> str:
    of = f" of {r['chip_bytes'] / GIB:.4g} GiB" if "chip_bytes" in r else ""
    short = "chip_bytes" in r and r["peak_bytes"] > r["usable"] * r["chip_bytes"]
    return (
        f"{format_bytes(r['peak_bytes'])}{of}: arguments {format_bytes(r['argument_bytes'])},"
        f" temporary {format_bytes(r['temporary_bytes'])}"
        + (f"; MORE than the {r['usable']:.0%} that jax takes" if short else "")
        + (f": give it more with {FRACTION}" if short and r["platform"] == "gpu" else "")
    )


def _kernels(r: dict[str, Any]) -> str:
    named = (
        f"{name} {k['instructions'] if k['count'] is None else k['count']:,}"
        for name, k in r["kernels"].items()
    )
    return ", ".join(named) or "none: XLA's own alone"


def _traffic(r: dict[str, Any]) -> dict[str, str]:
    rows, of = {}, _OF[r["program"]]
    for kind, c in (r["collectives"] or {}).items():
        size = _gigabytes(c["bytes"])
        across = f", {_gigabytes(c['across'])} of them between hosts" if c["across"] else ""
        rows["send to other slices" if kind == "send" else kind] = (
            f"{c['instructions']} instructions, {c['count']:,} {of}, {size}{across}"
        )
    once = r["bytes_accessed_loops_once"]
    loops_once = f" (XLA's count, loops once: {once:.3g})" if once else ""
    again = r["flops"] - r["model_flops"]
    flops = f"{r['flops']:.3g}" + (f", {r['model_flops']:.3g} of them the model's" if again else "")
    if r["unreadable"]:
        rows["collectives, bytes"] = (
            f"not known: jaxlib cannot read this compiler's program, a newer one may{loops_once}"
        )
        return rows | {"FLOPs a device": flops}
    rows["bytes in HBM"] = f"{_gigabytes(r['bytes_accessed'])} {of}{loops_once}"
    if o := r["outside_loop"]:
        launches = f", {o['launches']:,} kernels" if r["launches"] is not None else ""
        rows["besides"] = f"{_gigabytes(o['bytes'])}{launches}, once for {o['tokens']} tokens"
    rows["FLOPs a device"] = f"{flops}; {r['arithmetic_intensity']:.3g} per byte"
    return rows


def _times(r: dict[str, Any]) -> dict[str, str]:
    if "mfu_bound" not in r:
        return {}
    of, decode = _OF[r["program"]], r["program"] == "decode"
    small = r["step_seconds_bound"] < LEAST_STEP and not decode

    def share(mfu: float | None) -> str:
        return "" if mfu is None or mfu > 1 or decode or small else f" (MFU {mfu:.0%})"

    least = [
        f"{name} {_format_seconds(s)}{share(r['mfu_bounds'].get(name))}"
        for name, s in r["least_seconds"].items()
    ]
    rows = {"time by resource": ", ".join(least)}
    if small:
        small_text = "none: the model is so small that starting a step takes longer than its work"
        return rows | {"roofline": small_text}
    left_out = ["memory and network"] if r["unreadable"] else []
    left_out += ["the starts of kernels"] if decode else []
    if any(c["across"] for c in (r["collectives"] or {}).values()):
        left_out.append("the network between hosts, whose speed is not known")
    total = f"{_format_seconds(r['step_seconds_sum'])}{share(r['mfu_sum'])}"
    return rows | {
        "without overlap": f"{total}, {r['tokens_per_second_sum']:,.0f} tokens/s",
        "roofline": (
            f"at least {_format_seconds(r['step_seconds_bound'])} {of} ({r['bound_by']}), at most"
            f" {r['tokens_per_second_bound']:,.0f} tokens/s"
            + ("" if decode else f", MFU at most {r['mfu_bound']:.0%}")
            + ", by published peaks and perfect overlap"
            + (f"; left out: {', '.join(left_out)}" if left_out else "")
        ),
    }


def _parts(r: dict[str, Any]) -> str:
    train, launches = r["program"] == "train", r["launches"] is not None
    head = ("bytes by part", "forward", "backward") if train else ("bytes by part", "bytes")
    rows: list[tuple[str, ...]] = [(*head, "share", *(["kernels"] if launches else []))]
    for name, p in r["parts"].items():
        total = p["forward"] + p["backward"]
        sizes = [p["forward"], p["backward"]] if train else [total]
        more = [f"{p['launches']:,}"] if launches else []
        part = f"{total / r['bytes_accessed']:.0%}"
        rows.append((name, *map(_gigabytes, sizes), part, *more))
    return format_table(rows)


def _largest(r: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("largest instructions", "runs", "result", "part", "operation")]
    rows += [
        (_gigabytes(i["bytes"]), f"{i['count']:,}", _cut(i["type"], 28), i["part"], i["place"])
        for i in r["largest"]
    ]
    return format_table(rows)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 3]}..."


def _gigabytes(size: float) -> str:
    """Such as 160.2 GB, 1.82 GB or 35.1 MB: decimal units, as bandwidths have."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
    unit, name = next((u for u in units if size >= u[0]), (1.0, "B"))
    value = size / unit
    return f"{value:,.1f} {name}" if value >= 10 else f"{value:.3g} {name}"


def _format_seconds(seconds: float) -> str:
    """Such as 1.35 s, 120 ms or 35.1 µs."""
    size, unit = next((u for u in ((1, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "µs"))
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
