"""Makes the tables of ngpt_jax/aot/README.md: python tests/aot_tables.py FOLDER [gpu] [tpu] [remat]

Each cell is a run of ngpt_jax.tools.aot, which leaves its report in FOLDER. What is there already
is not made again, so a run that was stopped goes on. At the end the tables are printed. Takes an
hour or more; needs pip install '.[aot]', and cuDNN for the table of GPUs.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = {"124m": "124M", "0_5b": "0.5B", "1b": "1B"}
TPUS = {"v5e:4x4": "v5e-16", "v5e:8x8": "v5e-64", "v5p:2x2x4": "v5p-16", "v6e:4x4": "v6e-16"}
REMATS = ("none", "attention", "full")
GIB = 2**30


def report(folder, name, experiment, *options):
    """The report of a run, from its file where there is one; None where the run failed."""
    file = folder / f"{name}.json"
    if not file.exists():
        command = [sys.executable, "-m", "ngpt_jax.tools.aot", f"--json={file.resolve()}",
                   f"--config={ROOT}/experiments/{experiment}", *options]  # fmt: skip
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not file.exists():
            print(f"{name}: {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
            return None
    return json.loads(file.read_text())


def gpu(folder):
    """A row a program on eight H100s, 32,768 tokens a device."""
    rows = [("model", "kernels", "layers, remat", "peak GiB", "GB per step", "launched",
             "compute ms", "memory ms", "network ms", "roofline MFU",
             "MFU without overlap")]  # fmt: skip
    for (size, label), context, kind, kernels in itertools.product(
        MODELS.items(), (1024, 4096), ("gpt", "ngpt"), ("xla", "pallas")
    ):
        sequences = 32 * 1024 // context
        variant, qk_norm = (":gpt", ["--config.model.qk_norm=True"]) if kind == "gpt" else ("", [])
        r = report(
            folder, f"gpu_{size}_{context}_{kind}_{kernels}", f"{size}.py{variant}",
            "--topology=h100:8", f"--config.model.context={context}", f"--windows={sequences}",
            f"--config.model.kernels={kernels}", *qk_norm,
        )  # fmt: skip
        name = f"{label}, {context // 1024}k, {'nGPT' if kind == 'ngpt' else 'GPT, QK-norm'}"
        if r is None or "least_seconds" not in r:
            rows.append((name, kernels, *["-"] * 9))
            continue
        ms = [f"{1e3 * r['least_seconds'][k]:.1f}" for k in ("compute", "memory", "network")]
        peak, size_ = f"{r['peak_bytes'] / GIB:.1f}", f"{r['bytes_accessed'] / 1e9:.0f}"
        mfu = [f"{r[k]:.0%}" for k in ("mfu_bound", "mfu_sum")]
        layers = f"{'scanned' if r['scan_layers'] else 'unrolled'}, {r['remat']}"
        rows.append((name, kernels, layers, peak, size_, f"{r['launches']:,}", *ms, *mfu))
    return rows


def tpu(folder):
    """The most sequences a chip that fit with full remat, and their peak memory."""
    rows = [("sequences per chip (peak GiB)", *TPUS.values())]
    full = "--search", "--config.model.remat=full"
    for size, context in itertools.product(("1b", "0_5b"), (1024, 4096, 8192)):
        cells = []
        for topology in TPUS:
            name = f"tpu_{size}_{context}_{topology.replace(':', '_')}"
            options = f"--topology={topology}", f"--config.model.context={context}"
            cells.append(report(folder, name, f"{size}.py", *options, *full))
        rows.append((f"{MODELS[size]}, {context // 1024}k", *map(_sequences, cells)))
    return rows


def remat(folder):
    """1B on v5e:4x4 by remat: 8 sequences a chip, and the most that fit."""
    rows = [("1B, 1k, v5e-16", "peak GiB at 8 a chip", "GB per step", "most that fit (peak GiB)")]
    for kind in REMATS:
        options = "--topology=v5e:4x4", f"--config.model.remat={kind}"
        eight = report(folder, f"remat_{kind}_8", "1b.py", *options, "--windows=8")
        most = report(folder, f"remat_{kind}_most", "1b.py", *options, "--search")
        peak = "-" if not (eight and eight["peak_bytes"]) else f"{eight['peak_bytes'] / GIB:.2f}"
        moved = (eight or {}).get("bytes_accessed")
        rows.append((kind, peak, f"{moved / 1e9:.0f}" if moved else "-", _sequences(most)))
    return rows


def _sequences(r):
    if r is None or not r["fits"]:
        return "-"
    return f"{r['windows_per_chip']:g} ({r['peak_bytes'] / GIB:.2f})"


TABLES = {"gpu": gpu, "tpu": tpu, "remat": remat}


def main():
    if len(sys.argv) < 2 or not {*sys.argv[2:]} <= {*TABLES}:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or TABLES:
        head, *rows = TABLES[name](folder)
        print(f"\n{TABLES[name].__doc__}\n")
        for row in (head, ["---"] * len(head), *rows):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
