"""Checkpoints: whole or not there, whatever ends a run or damages a file."""

import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.path import atomicity, atomicity_defaults

from ngpt_jax.checkpoint import checksums, folder, saving
from ngpt_jax.checkpoint.checkpoints import Checkpoints, SaveError, kept
from ngpt_jax.checkpoint.restoring import restore_params
from ngpt_jax.config import CheckpointConfig, ConfigError

ROOT = Path(__file__).parents[1]


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


Moments = collections.namedtuple("Moments", "count mu")


def first_state(width=500):
    params = {"layers": {"kernel": jnp.ones((3, width))}, "table": jnp.arange(7.0)}
    moments = Moments(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
    return State(jnp.zeros((), jnp.int32), params, (None, moments))


@jax.jit
def next_state(state):
    mu = jax.tree.map(lambda m, p: 0.9 * m + jnp.cos(p), state.opt_state[1].mu, state.params)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state.params, mu)
    moments = Moments(state.opt_state[1].count + 1, mu)
    return State(state.step + 1, params, (None, moments)), jnp.sum(params["layers"]["kernel"])


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def train(workdir, steps, every=2, held_out=None, **config):
    """Losses by step, of a run from its start or its newest checkpoint."""
    checkpoints = Checkpoints(workdir, CheckpointConfig(**{"keep": 10, **config}))
    state, losses = first_state(), {}
    if checkpoints.latest_step() is not None:
        state, progress = checkpoints.restore(like(state))
        assert progress == {"position": 16 * int(state.step)}
    for step in range(int(state.step) + 1, steps + 1):
        state, loss = next_state(state)
        losses[step] = float(loss)
        if step % every == 0:
            at = (held_out or {}).get(step)
            checkpoints.save(state, {"position": 16 * step}, at)
        checkpoints.check_for_errors()
    checkpoints.close()
    return losses


def numbers(folder):
    return sorted(int(p.name) for p in Path(folder).iterdir())


def data_file(checkpoint):
    return max((checkpoint / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir with checkpoints 2, 4, 6, and the losses of 10 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir, 6)
    return workdir, train(tmp_path_factory.mktemp("longer"), 10)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of those to damage."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def by_commit_file(monkeypatch):
    """Storage like gs://, on which orbax does not rename."""
    monkeypatch.setattr(
        atomicity_defaults, "get_default_temporary_path_class",
        lambda path, **_: atomicity.CommitFileTemporaryPath,
    )  # fmt: skip


def test_a_run_goes_on_bit_for_bit(run, whole):
    assert list((run / "checkpoints/6").iterdir())
    assert train(run, 10) == {step: loss for step, loss in whole[1].items() if step > 6}
    assert numbers(run / "checkpoints") == [2, 4, 6, 8, 10]


def test_donated_right_after_a_save_and_after_a_restore(tmp_path):
    donating = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, progress = first_state(20_000), {"seen": [1]}
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, progress)
    progress["seen"].append(2)
    donating(state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    restored, seen = checkpoints.restore(like(first_state(20_000)))
    assert seen == {"seen": [1]}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    donated = [x.is_deleted() for x in jax.tree.leaves((donating(restored), restored)[1])]
    assert all(donated)


def test_read_by_orbax_itself(run, whole):
    with ocp.CheckpointManager(run / "checkpoints", item_names=("state", "progress")) as manager:
        assert manager.all_steps() == [2, 4, 6]
        restored = manager.restore(
            6,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(), progress=ocp.args.JsonRestore()
            ),
        )
    assert restored["progress"] == {"position": 96}
    assert float(restored["state"]["params"]["layers"]["kernel"].sum()) == whole[1][6]


def cut_data(c):
    path = data_file(c)
    size = path.stat().st_size
    cut(path)
    return f"{path.relative_to(c)} is {size - 10} bytes, not {size}"


def delete_data(c):
    path = data_file(c)
    path.unlink()
    return f"{path.relative_to(c)} is missing"


def flip_data(c):
    flip(data_file(c))
    return f"{data_file(c).relative_to(c)} has another checksum"


def flip_progress(c):
    flip(c / "progress/metadata")
    return "progress/metadata has another checksum"


def delete_progress(c):
    shutil.rmtree(c / "progress")
    return "progress/metadata is missing"


def flip_manifest(c):
    flip(c / "manifest.json", random.Random(3).random())
    return "manifest.json is not as it was written"


def cut_manifest(c):
    cut(c / "manifest.json")
    return "manifest.json is not as it was written"


def delete_manifest(c):
    (c / "manifest.json").unlink()
    return "manifest.json is missing"


def empty(c):
    shutil.rmtree(c)
    c.mkdir()
    return "manifest.json is missing"


def half_delete(c):
    shutil.rmtree(c / "state/ocdbt.process_0")
    return "is missing"


DAMAGES = [
    cut_data, delete_data, flip_data, flip_progress, delete_progress, flip_manifest, cut_manifest,
    delete_manifest, empty, half_delete,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_set_aside(run, whole, capsys, damage):
    problem = damage(run / "checkpoints/6")
    assert train(run, 10) == {step: loss for step, loss in whole[1].items() if step > 4}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: checkpoint 6 is damaged (")
    assert problem in line
    assert line.endswith(f"); set aside in {run}/damaged/6, going on from 4")
    assert numbers(run / "checkpoints") == [2, 4, 6, 8, 10]
    assert numbers(run / "damaged") == [6]


def test_every_flipped_byte_of_a_manifest_is_seen(run):
    c = run / "checkpoints/6"
    text = (c / "manifest.json").read_bytes()
    for i in range(0, len(text), 7):
        for bit in (1, 32):
            (c / "manifest.json").write_bytes(text[:i] + bytes([text[i] ^ bit]) + text[i + 1 :])
            with pytest.raises(checksums.DamagedCheckpoint):
                checksums.verify(folder.absolute(c))


def test_several_are_damaged_one_again(run, whole, capsys):
    (run / "damaged/6").mkdir(parents=True)
    flip_data(run / "checkpoints/6")
    empty(run / "checkpoints/4")
    assert train(run, 10) == {step: loss for step, loss in whole[1].items() if step > 2}
    assert sorted(p.name for p in (run / "damaged").iterdir()) == ["4", "6", "6-2"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("damaged/6-2, going on from 2")
    assert second.endswith("damaged/4, going on from 2")


def test_only_damaged_ones(run, capsys):
    for step in (2, 4, 6):
        cut_data(run / "checkpoints" / str(step))
    for _ in range(2):  # nor does the second start train anew
        with pytest.raises(ConfigError, match=f"--workdir={run} holds damaged checkpoints only"):
            train(run, 10)
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert numbers(run / "damaged") == [2, 4, 6]
    shutil.rmtree(run)
    assert len(train(run, 4)) == 4


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="checkpoints cannot be read or written: File exists"):
        Checkpoints(tmp_path, CheckpointConfig())


def test_leftovers_are_removed_without_a_word(run, capsys):
    c = run / "checkpoints"
    shutil.copytree(c / "6", c / "8.orbax-checkpoint-tmp")
    shutil.copytree(c / "6" / "state", c / "1.orbax-checkpoint-tmp.removed")
    Checkpoints(run, CheckpointConfig())
    assert numbers(c) == [2, 4, 6]
    assert capsys.readouterr().err == ""


def test_storage_without_a_rename(tmp_path, by_commit_file, capsys):
    train(tmp_path, 6, keep=2)
    c = tmp_path / "checkpoints"
    assert numbers(c) == [4, 6]
    shutil.copytree(c / "6", c / "8")
    (c / "8" / "commit_success.txt").unlink()  # killed in a save, or in a removal
    assert Checkpoints(tmp_path, CheckpointConfig()).latest_step() == 6
    assert numbers(c) == [4, 6]
    assert capsys.readouterr().err == ""
    flip_data(c / "6")
    assert list(train(tmp_path, 8)) == [5, 6, 7, 8]
    assert numbers(tmp_path / "damaged") == [6]


def test_all_files_are_on_the_disk_before_the_commit(tmp_path, monkeypatch):
    commit, threads = atomicity.AtomicRenameTemporaryPath.finalize, []
    fsync, forced = os.fsync, set()

    def noted(file):
        forced.add(os.fstat(file).st_ino)
        fsync(file)

    async def checked(self):
        checksums.verify(self.get())
        files = [Path(self.get()) / name for name in checksums._files(self.get())]
        assert forced >= {path.stat().st_ino for path in files} and len(files) > 5
        assert checksums.read(self.get())["step"] == 2
        threads.append(threading.current_thread())
        await commit(self)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", checked)
    train(tmp_path, 2)
    assert numbers(tmp_path / "checkpoints") == [2]
    assert threads != [threading.main_thread()]


def test_each_file_is_measured_once_by_the_process_that_wrote_it(tmp_path, monkeypatch):
    """Its own files before process 0 merges what all have written; of others' files it is told."""
    measure, write, seen = checksums._measure, checksums.write, []

    def noted(path):
        seen.append(str(path).partition(atomicity.TMP_DIR_SUFFIX)[2].partition("/")[2])
        return measure(path)

    def told(folder, facts, measured):
        assert measured and {n for n in seen if "process_0" in n} == set(measured)
        other = folder / "state/ocdbt.process_1/d/other"
        other.parent.mkdir(parents=True)
        other.write_bytes(b"of process 1")
        name = "state/ocdbt.process_1/d/other"
        write(folder, facts, measured | {name: {"bytes": 12, "crc32": 5}, "gone": {}})

    monkeypatch.setattr(checksums, "_measure", noted)
    monkeypatch.setattr(checksums, "write", told)
    train(tmp_path, 2)
    files = checksums.read(folder.absolute(tmp_path / "checkpoints/2"))["files"]
    assert files["state/ocdbt.process_1/d/other"] == {"bytes": 12, "crc32": 5}
    assert sorted(seen) == sorted(set(files) - {"state/ocdbt.process_1/d/other"})


def test_a_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    write = checksums.write

    def slow(*args):
        time.sleep(1)
        write(*args)

    monkeypatch.setattr(checksums, "write", slow)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    start = time.perf_counter()
    checkpoints.save(first_state(), {})
    checkpoints.check_for_errors()
    assert time.perf_counter() - start < 0.5
    assert checkpoints.latest_step() is None
    checkpoints.close()
    assert time.perf_counter() - start > 1
    assert checkpoints.latest_step() == 0


def test_the_same_step_twice(run):
    """Nothing is written again; a loss that was measured since is added to the manifest."""

    def files():
        return [(p, p.stat().st_ino) for p in sorted((run / "checkpoints").rglob("*"))]

    checkpoints, before = Checkpoints(run, CheckpointConfig()), files()
    state, _ = checkpoints.restore(like(first_state()))
    checkpoints.save(state, {"position": "another"})
    checkpoints.close()
    assert files() == before
    checkpoints.save(state, {"position": "another"}, 0.5)
    checkpoints.close()
    manifest = run / "checkpoints/6/manifest.json"
    assert [f for f in files() if f not in before] == [(manifest, manifest.stat().st_ino)]
    assert Checkpoints(run, CheckpointConfig(keep_best=1)).is_best(0.6) is False
    assert Checkpoints(run, CheckpointConfig(keep_best=1)).is_best(0.4) is True


NEVER = dict.fromkeys(range(1, 13))
LOSSES = {3: 5.0, 5: 1.0, 6: 2.0, 8: 3.0, 9: 2.5, 11: 4.0}


@pytest.mark.parametrize(
    ("config", "losses", "expected"),
    [
        ({"keep": 2}, LOSSES, [11, 12]),
        ({"keep": 1, "keep_every": 5}, {}, [5, 10, 12]),
        ({"keep": 1, "keep_best": 2}, LOSSES, [5, 6, 12]),
        ({"keep": 1, "keep_best": 3}, LOSSES, [5, 6, 9, 12]),
        ({"keep": 1, "keep_best": 3}, {}, [12]),  # no loss, no protection
        ({"keep": 1, "keep_best": 2}, {2: 7.0}, [2, 12]),
        ({"keep": 2, "keep_best": 1, "keep_every": 4}, LOSSES, [4, 5, 8, 11, 12]),
        ({"keep": 1, "keep_best": 1}, {4: float("nan"), 7: 9.0}, [7, 12]),
        ({"keep": 1, "keep_best": 1}, {4: 1.0, 7: 1.0}, [4, 12]),
    ],
    ids=str,
)
def test_which_checkpoints_stay(tmp_path, config, losses, expected):
    """With a restart after each save that follows an odd step, and step by step in one go."""
    known = {step: loss for step, loss in losses.items() if loss == loss}
    there: dict[int, float | None] = {}
    for step in range(1, 13):
        there[step] = known.get(step)
        there = {s: there[s] for s in sorted(kept(there, CheckpointConfig(**config)))}
    assert sorted(there) == expected
    for steps in (5, 6, 12):  # restarts at 5 and 6
        train(tmp_path, steps, every=1, held_out=losses, **config)
    assert numbers(tmp_path / "checkpoints") == expected


def test_a_save_waits_for_the_removals_of_the_one_before(run, monkeypatch, capsys):
    removed, unlink = threading.Event(), os.unlink

    def slow(*args, **kwargs):
        unlink(*args, **kwargs)
        removed.set()
        time.sleep(0.01)

    checkpoints = Checkpoints(run, CheckpointConfig(keep=2))
    state, _ = checkpoints.restore(like(first_state()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", slow)
        checkpoints.save(next_state(state)[0], {})
        assert removed.wait(10)
        checkpoints.save(next_state(next_state(state)[0])[0], {})  # clears leftovers
        checkpoints.close()
    assert numbers(run / "checkpoints") == [7, 8]
    assert capsys.readouterr().err == ""


def test_is_best(tmp_path):
    train(tmp_path, 6, every=2, held_out={2: 3.0, 4: 1.0}, keep=1, keep_best=2)
    best = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=2)).is_best
    assert [best(x) for x in (0.5, 2.0, 3.0, 4.0, float("nan"))] == [True, True] + [False] * 3
    best = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=3)).is_best
    assert [best(x) for x in (4.0, float("inf"))] == [True, False]
    assert not Checkpoints(tmp_path, CheckpointConfig()).is_best(0.0)


def test_is_best_counts_the_save_under_way(tmp_path, monkeypatch):
    go, write = threading.Event(), checksums.write
    monkeypatch.setattr(checksums, "write", lambda *a: (go.wait(10), write(*a)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_best=1))
    checkpoints.save(first_state(), {}, 1.0)
    assert [checkpoints.is_best(x) for x in (0.9, 1.1)] == [True, False]
    go.set()
    checkpoints.close()


def fail_once(monkeypatch, error):
    real = checksums.write

    def write(*args):
        monkeypatch.setattr(checksums, "write", real)
        raise error

    monkeypatch.setattr(checksums, "write", write)


@pytest.mark.parametrize("surface", ["check_for_errors", "save", "close"])
def test_an_error_in_the_background_surfaces_once(run, monkeypatch, surface, capsys):
    deadline = time.monotonic() + 10

    def late():
        return time.monotonic() > deadline

    checkpoints = Checkpoints(run, CheckpointConfig(keep=10, keep_best=1))
    state, _ = checkpoints.restore(like(first_state()))
    state, _ = next_state(state)
    fail_once(monkeypatch, OSError(5, "Input/output error"))
    checkpoints.save(state, {"position": 112}, 1.0)
    call = {
        "check_for_errors": lambda: [checkpoints.check_for_errors() for _ in iter(late, True)],
        "save": lambda: checkpoints.save(state, {"position": 112}),  # and starts it again
        "close": checkpoints.close,
    }[surface]
    with pytest.raises(SaveError) as told:
        call()
    assert str(told.value) == (
        "Checkpoint 7 could not be saved (input/output error); the last whole one is 6; see that"
        f" {run}/checkpoints can be written."
    )
    checkpoints.check_for_errors()
    assert checkpoints.is_best(1.5)  # the failed one is forgotten
    if surface != "save":
        assert numbers(run / "checkpoints") == [2, 4, 6]
    if surface != "save":
        checkpoints.save(state, {"position": 112})
    checkpoints.close()
    assert numbers(run / "checkpoints") == [2, 4, 6, 7]
    assert train(run, 8).keys() == {8}
    assert capsys.readouterr().err == ""


def test_too_little_room_is_told_before_anything_is_written(run, monkeypatch):
    checkpoints = Checkpoints(run, CheckpointConfig(keep=10))
    state, _ = checkpoints.restore(like(first_state()))
    state, _ = next_state(state)
    with monkeypatch.context() as patch:
        patch.setattr(folder.CheckpointFolder, "free_bytes", lambda _: 3 << 10)
        patch.setattr(saving, "Save", None)
        with pytest.raises(SaveError) as told:
            checkpoints.save(state, {})
    assert str(told.value) == (
        "Checkpoint 7 could not be saved (no space left on device; 3.0 KiB free, the checkpoint"
        f" needs 11.8 KiB); the last whole one is 6; make room in {run}/checkpoints, or lower"
        " checkpoint.keep."
    )
    assert numbers(run / "checkpoints") == [2, 4, 6]
    checkpoints.save(state, {})
    checkpoints.close()
    assert checkpoints.latest_step() == 7


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def noise(seed, count):
    """A state that cannot be compressed."""
    return State(jnp.int32(seed), {"a": jax.random.normal(jax.random.key(seed), (count,))}, ())


def test_a_disk_that_is_full(small_disk, monkeypatch, capfd):
    checkpoints = Checkpoints(small_disk, CheckpointConfig(keep=9))
    checkpoints.save(noise(1, 50_000), {})
    checkpoints.close()
    with pytest.raises(SaveError, match="could not be saved .no space left on device; 7"):
        checkpoints.save(noise(2, 250_000), {})  # seen before
    assert numbers(small_disk / "checkpoints") == [1]
    with monkeypatch.context() as patch:  # another program fills it meanwhile
        free = folder.CheckpointFolder.free_bytes
        patch.setattr(saving, "prepare", lambda f, *a: prepare_blindly(patch, free, f, *a))
        checkpoints.save(noise(2, 250_000), {})
        with pytest.raises(SaveError) as told:
            checkpoints.close()
    full = r"Checkpoint 2 could not be saved \(no space left on device; [\d.]+ (B|KiB) free, "
    assert re.match(full, str(told.value))  # a write may fill it to the last byte
    assert " free, the checkpoint needs 976.6 KiB); the last whole one is 1;" in str(told.value)
    assert numbers(small_disk / "checkpoints") == [1]
    checkpoints.save(noise(3, 50_000), {})
    checkpoints.close()
    assert numbers(small_disk / "checkpoints") == [1, 3]
    assert Checkpoints(small_disk, CheckpointConfig()).latest_step() == 3
    time.sleep(0.2)
    assert capfd.readouterr().err == ""  # orbax's stack traces


PREPARE = saving.prepare


def prepare_blindly(patch, free, *args):
    patch.setattr(folder.CheckpointFolder, "free_bytes", lambda _: 1 << 40)
    problem = PREPARE(*args)
    patch.setattr(folder.CheckpointFolder, "free_bytes", free)
    return problem


CHILD = """
import os, resource, shutil, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import *
workdir = sys.argv[1]
"""


def child(code, *args, **popen):
    """A program with this module's names."""
    program = CHILD.format(tests=str(ROOT / "tests")) + code
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen,
    )  # fmt: skip


def test_a_write_that_the_system_refuses(tmp_path):
    process = child(
        """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(workdir, CheckpointConfig())
checkpoints.save(noise(1, 20_000), {}); checkpoints.close()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
checkpoints.save(noise(2, 20_000), {})
try:
    while True: checkpoints.check_for_errors()
except SaveError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
checkpoints.save(noise(3, 20_000), {}); checkpoints.close()
""",
        tmp_path,
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == (
        "Checkpoint 2 could not be saved (file too large); the last whole one is 1; see that"
        f" {tmp_path}/checkpoints can be written.\n"
    )
    assert numbers(tmp_path / "checkpoints") == [1, 3]


KILLS = {
    "in the hashing": "checksums._measure = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "before the commit": """\
async def finalize(self):
    os.kill(os.getpid(), signal.SIGKILL)
atomicity.AtomicRenameTemporaryPath.finalize = finalize""",
    "in a removal": """\
unlink = os.unlink
def unlink_once(*args, **kwargs):
    unlink(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree.__globals__["os"].unlink = unlink_once""",
}


def test_killed_at_the_worst_moments(tmp_path, capsys):
    """Three runs that have saved 1 and 2, killed in the save of 3 or the removal of 1."""
    code = """
checkpoints, state = Checkpoints(workdir, CheckpointConfig(keep=2)), first_state()
for step in range(1, 9):
    if step == 3:
        checkpoints.close()
{patch}
    state, _ = next_state(state)
    checkpoints.save(state, {{"position": 16 * step}})
"""
    running = {
        name: child(code.format(patch=textwrap.indent(patch, "        ")), tmp_path / name)
        for name, patch in KILLS.items()
    }
    for name, process in running.items():
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, err
        c = tmp_path / name / "checkpoints"
        removal = name == "in a removal"
        assert any("orbax-checkpoint-tmp" in p.name for p in c.iterdir())
        checkpoints = Checkpoints(tmp_path / name, CheckpointConfig())
        assert numbers(c) == ([2, 3] if removal else [1, 2])
        assert int(checkpoints.restore(like(first_state()))[0].step) == 2 + removal
        assert capsys.readouterr().err == ""


def test_killed_at_any_moment(tmp_path, whole, capsys):
    code = """
checkpoints, state = Checkpoints(workdir, CheckpointConfig(keep=2)), first_state()
while True:
    state, _ = next_state(state)
    checkpoints.save(state, {"position": 16 * int(state.step)})
    print(int(state.step) - 1, flush=True)  # is whole
"""
    rng = random.Random(0)
    processes = [child(code, tmp_path / str(i)) for i in range(5)]
    for i, process in enumerate(processes):
        first = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        # Not communicate(), which would leave out what readline() has read ahead.
        last = int([first, *process.stdout.readlines()][-1])
        process.wait()
        checkpoints = Checkpoints(tmp_path / str(i), CheckpointConfig())
        latest = checkpoints.latest_step()
        assert last <= (latest or 0) <= last + 2
        assert capsys.readouterr().err == ""
        if latest is not None:
            state, progress = checkpoints.restore(like(first_state()))
            assert progress == {"position": 16 * latest}
            assert int(state.step) == latest == int(state.opt_state[1].count)
            if latest in whole[1]:
                assert float(jnp.sum(state.params["layers"]["kernel"])) == whole[1][latest]


def test_another_model_in_the_workdir(run):
    checkpoints = Checkpoints(run, CheckpointConfig())
    with pytest.raises(ConfigError) as told:
        checkpoints.restore(like(first_state(400)))
    assert str(told.value) == (
        f"--workdir={run}: checkpoint 6 is of another model or optimizer: its"
        " params/layers/kernel is (3, 500), not (3, 400); choose another --workdir."
    )
    sgd = first_state()._replace(opt_state=())
    with pytest.raises(ConfigError, match=r"its opt_state/1/count, which is \(\), is not in this"):
        checkpoints.restore(like(sgd))


def test_init_from_reads_parameters_only(run, whole, monkeypatch):
    params = like(first_state().params)
    asked, real = [], ocp.PyTreeCheckpointHandler.restore

    def restore(self, folder, args):
        asked.append(list(args.item))
        return real(self, folder, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    monkeypatch.chdir(run.parent)
    for path, step in [(run, 6), (run / "checkpoints/4", 4), ("run", 6), ("run/checkpoints/2", 2)]:
        got, progress = restore_params(path, params)
        assert progress == {"position": 16 * step}
        assert float(jnp.sum(got["layers"]["kernel"])) == whole[1][step]
        assert like(got) == params
    assert asked == [["params"]] * 4
    assert jax.jit(lambda t: t, donate_argnums=0)(got)["table"].shape == (7,)


def test_init_from_elsewhere_laid_out_as_asked(run):
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding),
        first_state().params,
    )
    assert like(restore_params(run, half)[0]) == half


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run / "nowhere", "{path}: no such folder; give a run's folder or a"),
        (lambda run: run / "checkpoints/6/manifest.json", "{path} is neither a run's folder"),
        (lambda run: run / "checkpoints/6/state", "{path} is neither a run's folder"),
        (lambda run: (run / "new/checkpoints").mkdir(parents=True) or run / "new",
         "{path} holds no checkpoint yet; give another run's folder."),
        (lambda run: flip_data(run / "checkpoints/6") and run,
         "{path}: {path}/checkpoints/6 is damaged (state/"),
        (lambda run: flip_data(run / "checkpoints/6") and run,
         "); give checkpoint 4, the one before it."),
        (lambda run: empty(run / "checkpoints/4") and run / "checkpoints/4",
         "{path}: {path} is damaged (manifest.json is missing); give another one."),
    ],
)  # fmt: skip
def test_init_from_what_is_not_there(run, make, message):
    path = make(run)
    with pytest.raises(ConfigError) as told:
        restore_params(path, like(first_state().params))
    assert "--config.init_from=" + message.format(path=path) in str(told.value) or (
        message.startswith(")") and message in str(told.value)
    )
    assert "\n" not in str(told.value)
    assert numbers(run / "checkpoints") == [2, 4, 6]
    assert not (run / "damaged").exists()


def test_init_from_another_model(run):
    for there, difference in [
        ({"layers": {"kernel": jnp.ones((3, 4))}, "table": jnp.ones(7)},
         "its layers/kernel is (3, 500), not (3, 4)"),
        ({"layers": {"kernel": jnp.ones((3, 500))}}, "its table, which is (7,), is not in this"),
        ({"layers": {"kernel": jnp.ones((3, 500)), "bias": jnp.ones(2)}, "table": jnp.ones(7)},
         "it has no layers/bias, which is (2,) here"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as told:
            restore_params(run, like(there))
        assert f"--config.init_from={run} holds another model: {difference}" in str(told.value)


def test_reasons_in_few_words():
    tensorstore = ValueError("RESOURCE_EXHAUSTED: Error writing: [os_error_code='122']")
    assert saving.why(tensorstore) == "disk quota exceeded"
    assert saving.why(PermissionError(13, "Permission denied")) == "permission denied"
    assert saving.why(RuntimeError("a\nb")) == "RuntimeError: a"
    assert saving.why(TimeoutError()) == "not written within 3600 s"
    assert json.dumps(saving.no_space(5 << 30, 7 << 30)) == (
        '"no space left on device; 5.00 GiB free, the checkpoint needs 7.00 GiB"'
    )
