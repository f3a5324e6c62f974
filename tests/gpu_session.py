"""The checks and timings of tests/gpu_session.sh, which calls this file for one part after another.

Example, on a machine with one NVIDIA GPU:
  tests/gpu_session.sh --out=gpu_session.jsonl --budget=840
"""

import argparse
import datetime
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DONE = ("agrees", "differs", "measured")
LIMIT = 4, 60.0  # times its seconds, and seconds at least: then a check hangs


class Check(NamedTuple):
    """A check or a timing.

    name: what stands before the first slash is its part of the session; a timing of training steps
      is a part of its own, since its memory must not hold what another left.
    seconds: that should be left for it. With less it is skipped.
    function: of gpu_checks.
    arguments: of the function.
    """

    name: str
    seconds: float
    function: str
    arguments: Mapping[str, Any] = {}

    @property
    def part(self) -> str:
        return self.name if self.function == "train" else self.name.partition("/")[0]


def plan(dry: bool) -> list[Check]:
    """All checks in their order."""
    checks = _golden(dry) + _kernels(dry)
    models = [("ngpt", "float32"), ("gpt", "float32"), ("ngpt", "bfloat16"), ("gpt", "bfloat16")]
    for kind, dtype in models[:1] if dry else models:
        arguments = {"kind": kind, "dtype": dtype, "dry": dry}
        checks.append(Check(f"model/{kind}/{dtype}", 8, "model", arguments))
    return checks + _timings(dry)


def _golden(dry: bool) -> list[Check]:
    checks = []
    for kind in ("ngpt",) if dry else ("ngpt", "gpt"):
        for state in ("pert",) if dry else ("init", "pert"):
            arguments = {"kind": kind, "state": state}
            checks.append(Check(f"golden/{kind}/float64/{state}", 8, "golden_exact", arguments))
        if not dry:
            name = f"golden/{kind}/float64/20-steps"
            checks.append(Check(name, 12, "golden_steps", {"kind": kind}))
        for dtype in ("float32",) if dry else ("float32", "bfloat16"):
            for kernels in ("pallas",) if dry else ("xla", "pallas"):
                arguments = {"kind": kind, "dtype": dtype, "kernels": kernels}
                name = f"golden/{kind}/{dtype}/{kernels}"
                checks.append(Check(name, 5, "golden_rounded", arguments))
    return checks


# Of rows (n, d). The first is that of 124M; the last two do not fill blocks.
_ROWS = [(32_768, 768), (8192, 1024), (4099, 1280), (1101, 37)]
_WIDE = [(32_768, 3072), (8192, 4096), (4099, 5120), (1101, 37)]
# Form, and (B, T, kv_heads, queries of each, head_dim).
_HEADS = [
    ("unit_after_rope", (32, 1024, 12, 1, 64)),
    ("rms_before_rope", (8, 1024, 16, 1, 64)),
    ("unit_after_rope", (4, 1000, 5, 4, 64)),
    ("rms_before_rope", (2, 70, 2, 3, 96)),
    ("none", (2, 130, 4, 2, 128)),
    ("unit_after_rope", (2, 37, 3, 2, 20)),
]
# Rows, ids in use, and columns with padding: one block each, then several.
_LOGITS = [(8192, 32_000, 32_000), (1023, 50_257, 50_304), (77, 1000, 1024)]


def _kernels(dry: bool) -> list[Check]:
    """Every kernel in both dtypes, the shapes of real models first."""
    shapes: dict[str, Sequence[tuple[int, ...]]] = {
        "residual_step": _ROWS,
        "swiglu": _WIDE,
        "rotate_heads": [shape for _, shape in _HEADS],
        "cross_entropy": _LOGITS,
        "add_rms_norm": _ROWS,
    }
    checks = []
    for kernel, of_kernel in shapes.items():
        for i, shape in enumerate(of_kernel[: 1 if dry else None]):
            shape = _tiny(kernel, shape) if dry else shape
            arguments: dict[str, Any] = {"name": kernel, "shape": shape}
            if kernel == "rotate_heads":
                arguments |= {"form": _HEADS[i][0], "per_row": i % 2 == 1}
            elif kernel == "residual_step":
                arguments |= {"copies": 2 - i % 2, "normalize_h": i % 2 == 1}
            for dtype in ("bfloat16",) if dry else ("bfloat16", "float32"):
                name = f"kernels/{kernel}/{'x'.join(map(str, shape))}/{dtype}"
                checks.append(Check(name, 5, "kernel", arguments | {"dtype": dtype}))
    return checks


def _tiny(kernel: str, shape: Sequence[int]) -> tuple[int, ...]:
    if kernel == "rotate_heads":
        return (1, 3, 2, shape[3], 16)
    return (5, 23, 32) if kernel == "cross_entropy" else (5, shape[1] % 100)


def _timings(dry: bool) -> list[Check]:
    fast = {"model.remat": "none", "model.scan_layers": "False", "model.loss_chunk": "8192"}
    # Sequences for 80 GB, seconds for two programs of each.
    models: dict[str, tuple[str | None, float, Mapping[str, str]]] = {
        "124m-1k": ("experiments/124m.py", 45, {"train.batch_size": "32"}),
        "0.5b-1k": ("experiments/0_5b.py", 70, {"train.batch_size": "32"}),
        "0.5b-4k": ("experiments/0_5b.py:ctx4k", 70, {"train.batch_size": "8"}),
        "1b-1k": ("experiments/1b.py", 100, {"train.batch_size": "16"}),
    }
    decoded: dict[str, Any] = {"prompt": 512, "tokens": 128, "rounds": 2}
    if dry:
        tiny = {
            "model.layers": "1", "model.width": "32", "model.heads": "2", "model.context": "32",
            "model.vocab_size": "64", "train.batch_size": "2",
        }  # fmt: skip
        fast = {"model.loss_chunk": "64"}
        models = {"tiny": (None, 5, tiny)}
        decoded = {"prompt": 16, "tokens": 64, "rounds": 1}
    checks = [
        Check(
            f"train/{model}/{kernels}", seconds, "train",
            {"spec": spec, "overrides": fast | fields | {"model.kernels": kernels},
             "steps": 3 if dry else 12},
        )
        for model, (spec, seconds, fields) in models.items()
        for kernels in (("xla",) if dry else ("pallas", "xla"))  # a CPU trains without kernels
    ]  # fmt: skip
    model, (spec, _, fields) = next(iter(models.items()))
    for rows in (1,) if dry else (1, 8):
        arguments = {"spec": spec, "overrides": fields, "rows": rows, **decoded}
        checks.append(Check(f"decode/{model}/{rows}-rows", 25, "decode", arguments))
    return checks


class Record:
    """The file of results: one JSON object a line."""

    def __init__(self, path: Path, session: int):
        self.path = path
        self._session = session
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for text in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(text))
                except json.JSONDecodeError:  # cut while it was written
                    continue

    def last(self) -> dict[str, dict[str, Any]]:
        """The last line of each check."""
        return {line["check"]: line for line in self.lines}

    def is_due(self, name: str) -> bool:
        """Whether the check has no result yet. Errors are tried again by another session."""
        line = self.last().get(name)
        if line is None:
            return True
        return line["result"] not in DONE and line["session"] != self._session

    def died(self, name: str) -> bool:
        """Whether this session began the check and its process ended inside it."""
        line = self.last().get(name, {})
        return line.get("result") == "begun" and line["session"] == self._session

    def add(self, check: str, result: str, **facts: Any) -> None:
        line = {"check": check, "result": result, "session": self._session, **facts}
        self.lines.append(line)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a") as file:
            file.write("\n" * cut + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if result != "begun":
            print(f"{check}: {result}  {_figures(line)}", flush=True)


def run_part(part: str, record: Record, deadline: float, dry: bool) -> int:
    """Runs what is due of a part. Returns 1 if a new process should go on after a fault."""
    checks = [check for check in plan(dry) if check.part == part]
    for check in checks:
        if record.died(check.name):
            record.add(check.name, "error", error="the process ended or hung inside this check")
    due = [check for check in checks if record.is_due(check.name)]
    machine: dict[str, Any] = {}
    for check in due:
        left = deadline - time.time()
        if left < check.seconds:
            why = f"{max(0, left):.0f} s left, {check.seconds:.0f} needed"
            record.add(check.name, "skipped", reason=why)
            continue
        import gpu_checks

        limit = max(LIMIT[0] * check.seconds, LIMIT[1])
        machine = machine or gpu_checks.machine(dry)
        record.add(check.name, "begun")
        faulthandler.dump_traceback_later(min(left, limit), exit=True)
        start = time.perf_counter()
        try:
            result, facts = getattr(gpu_checks, check.function)(**check.arguments)
        except Exception as e:
            traceback.print_exc()
            error = f"{type(e).__name__}: {e}".splitlines()[0]
            record.add(check.name, "error", error=error, **machine)
            if not gpu_checks.device_works():
                return 1
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds = round(time.perf_counter() - start, 1)
        record.add(check.name, result, seconds=seconds, **facts, **machine)
    return 0


def table(record: Record, dry: bool) -> str:
    """All results, and whether the kernels are verified."""
    from ngpt_jax.terminal import format_table

    last = record.last()
    rows: list[tuple[str, ...]] = [("check", "result", "figures")]
    for check in plan(dry):
        line = last.get(check.name, {"result": "never begun"})
        rows.append((check.name, line["result"], _figures(line)))
    return "\n".join([format_table(rows), verdict(last, dry)])


def _figures(line: Mapping[str, Any]) -> str:
    if "models" not in line:
        told = (line.get(name) for name in ("error", "reason", "summary"))
        return next((str(text)[:110] for text in told if text), "")
    texts = []
    for model, row in line["models"].items():
        if "decode_ms" in row:
            texts.append(f"{model} {row['decode_tokens_per_second']:,.0f} tokens/s")
            continue
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        texts.append(
            f"{model} {row['median_ms']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s, MFU"
            f" {mfu}, peak {(row['peak_bytes'] or 0) / 2**30:.1f} GiB"
        )
    ratios = line.get("ratios") or {"share": line["ngpt_share_of_gpt"]["decode"]}
    texts += [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if ratio is not None]
    return "; ".join(texts)


def verdict(last: Mapping[str, Mapping[str, Any]], dry: bool) -> str:
    """The line for VERIFIED, or what is missing."""
    # RMSNorm is not a step of the model yet, but a kernel like the others.
    needed = [c.name for c in plan(dry) if c.part in ("golden", "kernels", "model")]
    results = {name: last.get(name, {"result": "never begun"})["result"] for name in needed}
    missing = {name: result for name, result in results.items() if result != "agrees"}
    devices = {last[name]["device"] for name in needed if "device" in last.get(name, {})}
    if missing:
        some = ", ".join(f"{name} ({result})" for name, result in list(missing.items())[:5])
        return f"NOT verified: {len(missing)} of {len(needed)} checks do not agree: {some}"
    if len(devices) > 1:
        return f"NOT verified: results of several devices: {', '.join(sorted(devices))}"
    (device,) = devices
    if dry:
        return f"All {len(needed)} checks agree, interpreted on {device}: nothing for VERIFIED."
    today = datetime.date.today().isoformat()
    return f'All {len(needed)} checks agree. For VERIFIED:\n    "{device}": "{today}",'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default="gpu_session.jsonl", help="results, a line each"
    )
    parser.add_argument(
        "--budget", type=float, default=840, help="seconds in all; checks that no longer fit are"
        " skipped, and a second call with the same --out makes them",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, kernels interpreted")
    parser.add_argument("--deadline", type=int, help="seconds since 1970; instead of --budget")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--part", help="run this part alone")
    parser.add_argument("--table", action="store_true", help="print what is known")
    args = parser.parse_args(argv)
    deadline = args.deadline or int(time.time() + args.budget)
    parts = list(dict.fromkeys(check.part for check in plan(args.dry)))
    if args.list:
        print("\n".join(parts))
        return 0
    record = Record(args.out, deadline)
    if args.table:
        print(table(record, args.dry))
        return 0
    if args.part not in parts:
        parser.error("tests/gpu_session.sh runs all parts; --part is one of --list")
    return run_part(args.part, record, deadline, args.dry)


if __name__ == "__main__":
    sys.exit(main())
