"""The same windows in the same order on any number of processes and workers, and after a stop."""

import os
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import ROOT, write_bin
from test_multi_process import free_port

BATCHES = 200


def hashes(processes, first, home, *flags):
    """{(batch, row): hash} over all processes."""
    command = [
        sys.executable, "tests/stream_hashes.py", str(BATCHES - first), str(first),
        "--config=experiments/quickstart.py:debug", *flags,
    ]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(home), "PYTHONPATH": str(ROOT)}
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    several = [
        [address, f"--num_processes={processes}", f"--process_id={i}"] if processes > 1 else []
        for i in range(processes)
    ]
    running = [
        subprocess.Popen(
            command + own, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for own in several
    ]  # fmt: skip
    found = {}
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        for line in out.splitlines():
            if not line.startswith("window "):
                continue  # Gloo tells of its connections
            _, batch, row, digest = line.split()
            assert found.setdefault((int(batch), int(row)), digest) == digest
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_the_stream_is_the_same_everywhere(tmp_path, kind):
    size = ["--config.train.batch_size=8", "--config.model.context=32"]
    flags = size
    if kind == "mixture":
        tokens = np.random.default_rng(0).integers(0, 257, 5000)
        write_bin(tmp_path / "t.bin", tokens)
        flags = [
            *size, "--config.data.source=mixture", "--config.data.mixture.std.source=stdlib",
            "--config.data.mixture.std.weight=0.7", "--config.data.mixture.bin.source=bin",
            f"--config.data.mixture.bin.paths={tmp_path}/t.bin", "--config.data.seed=3",
            "--config.data.packing=best_fit", "--config.data.mask_documents=True",
        ]  # fmt: skip
    alone = hashes(1, 0, tmp_path / "a", *flags)
    assert sorted(alone) == [(b, r) for b in range(BATCHES) for r in range(8)]
    assert len(set(alone.values())) > 500
    workers = "--config.data.workers=2"
    # Each with an empty cache: process 0 prepares it while the others wait.
    assert hashes(4, 0, tmp_path / "b", *flags) == alone
    assert hashes(2, 0, tmp_path / "c", *flags, workers) == alone
    rest = {key: digest for key, digest in alone.items() if key[0] >= 77}
    assert hashes(1, 77, tmp_path / "a", *flags, workers) == rest
    assert hashes(2, 77, tmp_path / "a", *flags) == rest
    # Another batch size: the same windows one after another.
    halved = [f for f in flags if "batch_size" not in f] + ["--config.train.batch_size=4"]
    other = hashes(1, 0, tmp_path / "a", *halved)
    in_order = [other[key] for key in sorted(other)]
    assert in_order == [alone[key] for key in sorted(alone)][: len(in_order)]
