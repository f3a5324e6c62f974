import importlib.metadata
import os
import shutil
import tempfile

# Prepared tokens and other caches go to a home of the tests' own, also those of subprocesses.
os.environ["HOME"] = tempfile.mkdtemp(prefix="ngpt_jax_home")

# Tests compile much and run little: skip the costly passes of XLA's CPU compiler.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest

from ngpt_jax import config as config_lib


@pytest.fixture(scope="session", autouse=True)
def home():
    """The tests' own, removed at their end."""
    yield os.environ["HOME"]
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def cuda_plugin():
    """Skips where what compiles for GPUs is not installed."""
    try:
        importlib.metadata.distribution("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs jax-cuda13-plugin and nvidia-cuda-nvcc: pip install '.[aot]'")


@pytest.fixture(scope="session")
def h100(cuda_plugin):
    """The sharding of arrays on one H100 that is not there."""
    from ngpt_jax.aot.topologies import topology_devices

    return jax.sharding.SingleDeviceSharding(topology_devices("h100:1")[0])


@pytest.fixture
def x64():
    """float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def tiny():
    """make(**{"section.field": value}) -> resolved Config of a model that compiles in a second."""

    def make(**fields):
        values = config_lib.default_config()
        values.model.update(layers=2, width=16, heads=2, context=16, vocab_size=60, loss_chunk=64)
        values.train.update(steps=8, batch_size=4)
        for name, value in fields.items():
            section, leaf = name.rsplit(".", 1)
            node = values
            for part in section.split("."):
                node = node[part]
            node[leaf] = value
        return config_lib.from_config_dict(values)

    return make


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """Path of a small text."""
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over the lazy dog and runs away".split()
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(300)))
    return str(path)


@pytest.fixture
def small(tiny, book):
    """A run of 12 steps on the book, with a row of metrics every 3."""

    def make(**fields):
        return tiny(**{
            "data.source": "text", "data.paths": (book,), "model.vocab_size": None,
            "train.steps": 12, "optimizer.learning_rate": 1e-2, "log.every": 3,
            "eval.every": 4, "eval.batches": 1, "checkpoint.every": 5, "sample.tokens": 0, **fields,
        })  # fmt: skip

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of finished runs of both kinds, on a small text."""
    from ngpt_jax.training import loop

    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    for kind in ("ngpt", "gpt"):
        values = config_lib.default_config()
        values.model.update(kind=kind, layers=2, width=16, heads=2, context=32, loss_chunk=64)
        values.data.update(source="text", paths=(str(folder / "book.txt"),), held_out=0.5)
        values.data.eval_paths = (f"val={folder / 'val.txt'}",)
        values.train.update(steps=4, batch_size=4)
        values.sample.tokens = 12
        values.optimizer.learning_rate = 1e-2
        (folder / "val.txt").write_text("the lazy dog\n" * 20)
        config = config_lib.from_config_dict(values)
        assert loop.train(config, folder / kind) == 0
    return folder
