"""Runs the debug model for long, and watches memory, threads, files and shared memory.

    python tests/soak.py --steps=30000 --out=/tmp/soak

Writes samples.csv, prints a table at the end, and ends with 1 where memory rose by more than 5 %
after the first tenth of the run, or threads, files or shared memory grew. A run that was stopped
goes on (its samples are of the last start). More flags go to ngpt_jax.main.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("seconds", "step", "rss_mib", "threads", "files", "shared_memory")


def sample(pid: int, workdir: Path, start: float) -> tuple[float, ...] | None:
    """What a process holds now; None once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        facts = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        files = len(os.listdir(f"/proc/{pid}/fd"))
        rss, threads = int(facts["VmRSS"].split()[0]) / 1024, int(facts["Threads"])
    except (OSError, KeyError):
        return None
    metrics = workdir / "metrics.jsonl"
    step = 0
    if metrics.exists():
        with metrics.open("rb") as f:
            f.seek(max(0, metrics.stat().st_size - 4096))
            lines = f.read().decode().splitlines()
        steps = [line.split(",")[0] for line in lines if line.startswith('{"step"')]
        step = int(steps[-1].split(":")[1]) if steps else 0
    return time.time() - start, step, round(rss, 1), threads, files, len(os.listdir("/dev/shm"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    given, more = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    workdir = given.out / "run"
    command = [
        sys.executable, "-m", "ngpt_jax.main", "--config=experiments/quickstart.py:debug",
        f"--workdir={workdir}", f"--config.train.steps={given.steps}", "--config.log.every=50",
        "--config.eval.every=500", "--config.checkpoint.every=100", "--config.checkpoint.keep=3",
        "--config.checkpoint.keep_best=2", "--config.checkpoint.keep_every=10000", *more,
    ]  # fmt: skip
    root, start, samples = Path(__file__).parents[1], time.time(), []
    with (given.out / "log.txt").open("a") as log, (given.out / "samples.csv").open("w") as table:
        writer = csv.writer(table)
        writer.writerow(NAMES)
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(given.every)
            if (found := sample(process.pid, workdir, start)) is not None:
                samples.append(found)
                writer.writerow(found)
                table.flush()
    if process.returncode:
        print(f"exit code {process.returncode}; see {given.out}/log.txt")
        return 1
    return report([s for s in samples if s[1] >= 0.1 * given.steps])


def report(samples: list[tuple[float, ...]]) -> int:
    """Prints least, most and last of each column after the first tenth; whether all are flat."""
    early, late = samples[: len(samples) // 9], samples[-len(samples) // 9 :]
    bad = 0
    print(f"after the first tenth: {len(samples)} samples")
    for i, name in enumerate(NAMES):
        if name in ("seconds", "step"):
            continue
        column = [s[i] for s in samples]
        first, last = (max(s[i] for s in part) for part in (early, late))
        allowed = 1.05 * first if name == "rss_mib" else first
        flat = last <= allowed
        bad += not flat
        print(f"{name:14} least {min(column):8} most {max(column):8}  early most {first:8}"
              f"  late most {last:8}  {'flat' if flat else 'GROWS'}")  # fmt: skip
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
