"""Rules, and a run of eight_devices.py with as many simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from ngpt_jax.config import ConfigError
from ngpt_jax.parallel import rules

ROOT = Path(__file__).parents[1]
MESH = jax.sharding.AbstractMesh((2, 4, 2, 1), rules.MESH_AXES)


@pytest.mark.slow
def test_on_eight_devices():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=8", "tests/eight_devices.py"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    print(done.stdout)  # each test with its result
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_mesh_axis_used_twice_is_refused():
    twice = {**rules.PARAMETERS, "embed": ("fsdp",)}
    with pytest.raises(ConfigError, match="Mesh axis fsdp would shard both embed and mlp of w"):
        rules.param_spec(("embed", "mlp"), {"embed": 8, "mlp": 8}, MESH, twice, name="w")


def test_specs_follow_from_the_names():
    sizes = {"layers": 3, "embed": 6, "heads": 4, "head_dim": 8, "mlp": 16}
    spec = rules.param_spec(("layers", "embed", "heads", "head_dim"), sizes, MESH)
    assert spec == P(None, None, "tensor", "fsdp")
    assert rules.param_spec(("mlp", "embed"), sizes, MESH) == P(("tensor", "fsdp"), None)
    assert rules.activation_spec(("batch", "length", "embed"), (8, 4, 6), MESH) == P(
        ("data", "fsdp"), None, None
    )
    assert rules.activation_spec(("batch", "length"), (1, 4), MESH) == P(None, None)
    assert rules.spec_axes(P(("data", "fsdp"), None, "context")) == ("data", "fsdp", "context")


def test_no_parameter_is_cut_along_embed():
    assert rules.PARAMETERS["embed"] == ()


def test_rules_name_known_axes_alone():
    assert set(rules.PARAMETERS) <= set(rules.ACTIVATIONS) | {"layers", "joined", "vocab"}
    for table in (rules.PARAMETERS, rules.ACTIVATIONS):
        assert {m for cut in table.values() for m in cut} <= set(rules.MESH_AXES)


@pytest.mark.parametrize(
    ("shape", "mend"),
    [
        ((1, 2, 4, 1), "try mesh.tensor=2 and mesh.fsdp=-1."),
        ((1, 3, 2, 1), "try mesh.fsdp=1 and mesh.data=-1."),
        ((1, 5, 2, 1), "try mesh.fsdp=1 and mesh.data=-1."),
        ((1, 8, 2, 1), "try mesh.fsdp=4 and mesh.data=-1."),
    ],
)
def test_the_mend_of_a_mesh_is_one_that_divides(shape, mend):
    mesh = jax.sharding.AbstractMesh(shape, rules.MESH_AXES)
    sizes = {"embed": 6, "heads": 2, "head_dim": 4, "mlp": 8}
    names = (
        ("embed", "mlp") if mend != "try mesh.tensor=2 and mesh.fsdp=-1." else ("embed", "heads")
    )
    with pytest.raises(ConfigError) as e:
        rules.param_spec(names, sizes, mesh)
    assert str(e.value).endswith(mend)
