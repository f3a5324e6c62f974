"""What needs eight devices; test_sharding.py runs this file with eight simulated ones."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ngpt_jax import config as config_lib
from ngpt_jax.config import ConfigError
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.directions import angle_turned, cap_angle, tangent, unit_step
from ngpt_jax.inference.loading import LoadedModel
from ngpt_jax.model.attention import causal_attention
from ngpt_jax.model.loss import cross_entropy
from ngpt_jax.model.params import unit_axes
from ngpt_jax.model.transformer import init_params
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.parallel.mesh import BatchPlacer, make_mesh
from ngpt_jax.projection import keep_params_on_sphere, project_params, sphere_deviation
from ngpt_jax.training import layout
from ngpt_jax.training import step as step_lib

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "data 2, fsdp 4": {"data": 2, "fsdp": 4},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2, tensor 2, context 2": {"fsdp": 2, "tensor": 2, "context": 2},
    "tensor 8": {"fsdp": 1, "tensor": 8},
}
STEPS, BATCH, CONTEXT, VOCAB = 8, 8, 64, 257


def make(kind, mesh, **fields):
    values = config_lib.default_config()
    values.model.update(
        kind=kind, layers=2, width=64, heads=8, context=CONTEXT, vocab_size=VOCAB, loss_chunk=64,
        dtype="float64", param_dtype="float64",
    )  # fmt: skip
    values.train.update(steps=STEPS, batch_size=BATCH)
    values.optimizer.learning_rate = 1e-2
    values.mesh.update(**mesh)
    for name, value in fields.items():
        *sections, leaf = name.split("__")
        node = values
        for section in sections:
            node = node[section]
        node[leaf] = value
    return config_lib.from_config_dict(values)


def on(config, devices):
    mesh = make_mesh(config, devices)
    return layout.for_mesh(config, mesh)[0], mesh


def collectives(compiled):
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf"= \S+ ({kinds})\(", compiled.as_text()))


def first_params(config):
    return jax.device_get(jax.jit(lambda: init_params(config.model, jax.random.key(0)))())


def train(config, devices, first=None):
    """Losses, final and first parameters.

    first: parameters to start with; None: those of init, which takes as long to compile as a step.
    """
    config, mesh = on(config, devices)
    step = layout.lower_train_step(config, mesh).compile()
    placer = BatchPlacer(mesh, BATCH, CONTEXT)
    tx, _ = make_optimizer(config)
    like = layout.abstract_state(config, tx, mesh)
    rng = np.random.default_rng(0)
    losses = []
    first = first and jax.device_put(first, layout.shardings(like.params))
    state = layout.first_state(config, tx, mesh, first)
    first = jax.device_get(state.params)
    with jax.set_mesh(mesh):
        for _ in range(STEPS):
            tokens = rng.integers(0, VOCAB, (BATCH, CONTEXT + 1), np.int32)
            state, metrics = step(
                state, placer({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
            )
            losses.append(float(metrics["loss"]))
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(layout.shardings(like))):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    return losses, jax.device_get(state.params), first


@pytest.fixture(scope="module")
def one_device():
    results = {}

    def get(kind):
        if kind not in results:
            results[kind] = train(make(kind, {"fsdp": 1}), jax.devices()[:1])
        return results[kind]

    return get


def assert_same(a, b, atol=1e-9):
    np.testing.assert_allclose(a[0], b[0], atol=atol, rtol=0)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


# GPT differs in its norms, which no mesh cuts: two meshes are enough for it.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "ngpt") for name in MESHES),
        ("data 2, fsdp 4", "gpt"),
        ("fsdp 2, tensor 2, context 2", "gpt"),
    ],
)
def test_every_mesh_trains_what_one_device_trains(x64, one_device, name, kind):
    one = one_device(kind)
    first = None if name == "fsdp 2, tensor 2, context 2" else one[2]
    assert_same(train(make(kind, MESHES[name]), jax.devices(), first), one)


def test_microbatches_grouped_heads_and_an_uncut_kv_head_change_nothing(x64):
    fields = {"model__kv_heads": 1, "model__remat": "full", "train__accumulate": 2}
    mesh = {"fsdp": 2, "tensor": 2, "context": 2}
    one = dict(fields, train__accumulate=1)
    a = train(make("ngpt", {"fsdp": 1}, **one), jax.devices()[:1])
    b = train(make("ngpt", mesh, **fields), jax.devices(), a[2])
    assert_same(a, b)


def test_scales_without_channels_and_factors_by_depth_change_nothing(x64):
    fields = {"model__residual": "exp", "model__alpha_depth": "root", "model__alpha_sign": "signed"}
    forms = {
        "alpha_a": "scalar",
        "s_qk": "scalar",
        "s_u": "fixed",
        "s_v": "scalar",
        "s_z": "scalar",
    }
    fields |= {f"model__{name}__form": form for name, form in forms.items()}
    a = train(make("ngpt", {"fsdp": 1}, **fields), jax.devices()[:1])
    b = train(make("ngpt", {"fsdp": 2, "tensor": 2, "context": 2}, **fields), jax.devices(), a[2])
    assert_same(a, b)


def test_muon_and_the_preconditioned_logits_on_a_mesh(x64):
    fields = {"optimizer__recipe": "muon", "optimizer__logit_gradient": "preconditioned"}
    a = train(make("ngpt", {"fsdp": 1}, **fields), jax.devices()[:1])
    b = train(make("ngpt", {"fsdp": 2, "tensor": 2, "data": 2}, **fields), jax.devices(), a[2])
    assert_same(a, b, atol=1e-7)  # Newton-Schulz steps make small differences larger


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("ngpt", {"fsdp": 2, "tensor": 2}), ("gpt", {"fsdp": 2, "context": 2})],
)
def test_kernels_on_a_mesh_give_what_xla_gives_on_one_device(kind, sizes):
    """Interpreted, on shards of rows, heads, hidden units, positions and the vocabulary."""
    fields = {"model__dtype": "float32", "model__param_dtype": "float32", "model__qk_norm": True}
    fields |= {"model__context": 16, "model__kv_heads": 4, "model__width": 32}
    rng, found = np.random.default_rng(0), []
    first = first_params(make(kind, {"fsdp": 1}, **fields))
    tokens = rng.integers(0, VOCAB, (BATCH, 17), np.int32)
    positions = np.arange(16, dtype=np.int32)[None] % rng.integers(3, 16, (BATCH, 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
        "segment_ids": np.cumsum(positions == 0, axis=1, dtype=np.int32),
    }  # fmt: skip
    for kernels, mesh_sizes in (("xla", {"fsdp": 1}), ("pallas", sizes)):
        count = int(np.prod(list(mesh_sizes.values())))
        config, mesh = on(make(kind, mesh_sizes, **fields), jax.devices()[:count])
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, kernels=kernels)
        )
        with jax.set_mesh(mesh):
            params = jax.device_put(first, layout.param_shardings(config.model, mesh))
            run = jax.jit(lambda p, b, c=config: step_lib._loss_and_grads(c, p, b))
            traced = run.trace(params, BatchPlacer(mesh, BATCH, 16)(batch))
            assert ("pallas_call" in str(traced.jaxpr)) == (kernels == "pallas")
            found.append(jax.device_get(run(params, BatchPlacer(mesh, BATCH, 16)(batch))))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", MESHES)
def test_the_projection_needs_no_communication(name):
    config, mesh = on(make("ngpt", MESHES[name]), jax.devices())
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, dtype="float32", param_dtype="float32")
    )
    axes = unit_axes(config.model)
    tx = keep_params_on_sphere(axes)
    shapes = layout.abstract_state(config, tx, mesh).params
    for fn in (
        lambda p, u: optax.apply_updates(p, tx.update(u, tx.init(p), p)[0]),
        lambda p, u: project_params(p, axes),
    ):
        out = layout.shardings(shapes)
        assert not collectives(jax.jit(fn, out_shardings=out).lower(shapes, shapes).compile())


def test_what_an_optimizer_keeps_is_cut_along_the_axes_that_it_has_in_full():
    """Norms are whole along their vectors, and a step with them needs no communication."""
    fields = {"model__dtype": "float32", "model__param_dtype": "float32"}
    config, mesh = on(make("ngpt", MESHES["fsdp 4, tensor 2"], **fields), jax.devices())
    axes = unit_axes(config.model)
    keep = optax.partition(
        {"all": keep_params_on_sphere(axes, "initial"), "none": optax.set_to_zero()},
        jax.tree.map(lambda _: "all", axes, is_leaf=lambda x: x is None),
    )
    tx = optax.chain(
        optax.scale_by_adam(), tangent(axes), unit_step(axes, 0.1), cap_angle(axes, lambda _: 0.1),
        keep,
    )  # fmt: skip

    def leaves(tree):
        absent = None, optax.MaskedNode()
        return jax.tree.leaves(tree, is_leaf=lambda x: any(x is a or x == a for a in absent))

    like = layout.abstract_state(config, tx, mesh)
    norms = like.opt_state[-1].inner_states["all"].inner_state.norms
    vectors = [x for x in zip(*map(leaves, (axes, like.params, norms))) if x[0] is not None]
    assert len(vectors) == len(jax.tree.leaves(norms)) == len(jax.tree.leaves(axes))
    for axis, p, n in vectors:
        assert n.dtype == jnp.float32 and n.shape[axis] == 1 and n.size == p.size / p.shape[axis]
        full = [None if i == axis else e for i, e in enumerate(p.sharding.spec)]
        assert n.sharding.spec == P(*full) and any(full)
    moments = jax.tree.leaves(like.opt_state[0].mu)
    assert [m.sharding for m in moments] == [p.sharding for p in jax.tree.leaves(like.params)]
    factored = layout.abstract_state(
        config, optax.scale_by_factored_rms(min_dim_size_to_factor=2), mesh
    ).opt_state
    for x in jax.tree.leaves(factored.v_row):  # of fewer axes: whole
        assert x.sharding.is_fully_replicated

    # A run that takes another's weights, which have other norms than its own.
    params = jax.tree.map(lambda p: 3 * p, layout.first_state(config, tx, mesh).params)
    params = jax.device_put(params, layout.shardings(like.params))
    with jax.set_mesh(mesh):
        state = layout.first_state(config, tx, mesh, params)
        assert jax.tree.leaves(params)[0].is_deleted()
        compiled = jax.jit(
            lambda u, s, p: tx.update(u, s, p),
            out_shardings=layout.shardings((state.params, state.opt_state)),
        ).lower(state.params, state.opt_state, state.params).compile()  # fmt: skip
        updates, opt_state = compiled(
            jax.tree.map(jnp.sin, state.params), state.opt_state, state.params
        )
        new = optax.apply_updates(state.params, updates)
    assert not collectives(compiled)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(layout.shardings(like))):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    norms = opt_state[-1].inner_states["all"].inner_state.norms
    for n in jax.tree.leaves(norms):
        np.testing.assert_allclose(n, 3, rtol=1e-6)
    assert max(jax.tree.leaves(sphere_deviation(new, axes, 3.0))) < 3e-6
    assert max(jax.tree.leaves(angle_turned(state.params, new, axes).largest)) > 0.05


def test_the_projection_keeps_types_and_shardings_on_an_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    axes = {"a": 0, "b": (1,), "c": None}
    specs = {"a": P(None, ("tensor", "fsdp")), "b": P("tensor", None, "fsdp"), "c": P("fsdp")}
    shapes = {"a": (16, 8), "b": (2, 16, 8), "c": (8,)}
    with jax.set_mesh(mesh):
        params = {
            n: jax.device_put(
                jax.random.normal(jax.random.key(0), shapes[n]), NamedSharding(mesh, specs[n])
            )
            for n in axes
        }
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params) | {"a": params["a"]}
        updates = jax.tree.map(jnp.ones_like, params)
        tx = keep_params_on_sphere(axes)

        @jax.jit
        def step(params, updates):
            params = project_params(params, axes)
            updates, _ = tx.update(updates, tx.init(params), params)
            for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates)):
                assert jax.typeof(p) == jax.typeof(u)  # shape, dtype and sharding
            return optax.apply_updates(params, updates)

        moved = step(params, updates)
        for name in axes:
            assert moved[name].dtype == params[name].dtype
            assert moved[name].sharding == params[name].sharding
            assert jax.typeof(moved[name]) == jax.typeof(params[name])
        np.testing.assert_allclose(jnp.linalg.norm(moved["a"], axis=0), 1, atol=1e-6)


def loss_bytes(mesh, chunk):
    """Collectives of a value-and-grad of the loss on a mesh, by kind: (count, bytes)."""
    from ngpt_jax.aot import hlo

    width, vocab = 16, 1024
    hidden = P(("data", "fsdp"), "context", None)
    shapes = [
        jax.ShapeDtypeStruct((8, 256, width), jnp.float32, sharding=NamedSharding(mesh, hidden)),
        jax.ShapeDtypeStruct(
            (vocab, width), jnp.float32, sharding=NamedSharding(mesh, P(("tensor", "fsdp"), None))
        ),
        *(
            jax.ShapeDtypeStruct((8, 256), t, sharding=NamedSharding(mesh, P(*hidden[:2])))
            for t in (jnp.int32, jnp.float32)
        ),
    ]

    def fn(*args):
        return jax.value_and_grad(lambda *a: cross_entropy(*a, vocab, chunk), (0, 1))(*args)

    with jax.set_mesh(mesh):
        program = hlo.analyze(jax.jit(fn).lower(*shapes).compile().as_text())
    return {k: (c.count, c.bytes) for k, c in program.collectives.items()}


def test_collectives_of_the_loss_do_not_grow_with_its_chunks():
    _, mesh = on(make("ngpt", MESHES["fsdp 8"]), jax.devices())
    tokens = 256  # of a device
    four, sixteen = (loss_bytes(mesh, tokens // n) for n in (4, 16))
    assert four == sixteen
    assert four["all-gather"] == (1, 1024 * 16 * 4)  # the table, once

    _, mesh = on(make("ngpt", MESHES["fsdp 2, tensor 2, context 2"]), jax.devices())
    tokens = 512
    four, sixteen = (loss_bytes(mesh, tokens // n) for n in (4, 16))
    assert {k: b for k, (_, b) in four.items()} == {k: b for k, (_, b) in sixteen.items()}
    assert four["all-gather"] == sixteen["all-gather"]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_layer_keeps_its_gathered_weights_for_the_backward_pass(remat):
    def temporary_bytes(layers):
        fields = {"model__layers": layers, "model__width": 256, "model__context": 16}
        fields |= {"model__remat": remat, "model__scan_layers": True}
        fields |= {"model__dtype": "float32", "model__param_dtype": "float32"}
        config, mesh = on(make("ngpt", {"fsdp": 8}, **fields), jax.devices())
        step = layout.lower_train_step(config, mesh).compile()
        return step.memory_analysis().temp_size_in_bytes

    whole = 4 * (4 + 3 * 4) * 256**2  # bytes of a layer's weights
    assert (temporary_bytes(6) - temporary_bytes(3)) / 3 < whole / 2


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (2, 2, 128)])
def test_splash_with_positions_cut_equals_xla_on_one_device(documents, heads, kv_heads, head_dim):
    mesh = jax.make_mesh(
        (1, 2, 2, 2), ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4
    )
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (2, 512, heads, head_dim)
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
    ids = jnp.cumsum(jax.random.bernoulli(keys[3], 0.01, (2, 512)), axis=1) if documents else None

    def grads(kernel, **kwargs):
        def weighted(q, k, v):
            out = causal_attention(q, k, v, head_dim**0.5, ids, kernel, **kwargs)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        (_, out), grads = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    plain = grads("xla")
    with jax.set_mesh(mesh):
        cut = grads("splash", interpret=True), grads("xla")
    for result in cut:
        for a, b in zip(plain, result):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(a)))


def test_heads_exchanged_for_positions_give_the_same(x64, monkeypatch):
    """cuDNN's way along context, with another kernel in its place."""
    from ngpt_jax.model import attention

    monkeypatch.setitem(attention._KERNELS, "cudnn", attention._xla)
    mesh = jax.make_mesh(
        (1, 2, 1, 4), ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4
    )
    q, k, v = (
        jax.random.normal(key, (2, 32, 4, 8)) for key in jax.random.split(jax.random.key(0), 3)
    )
    ids = jnp.arange(32)[None].repeat(2, axis=0) // 10
    for kv in (4, 2):
        args = (q, k[:, :, :kv], v[:, :, :kv], 3.0, ids)
        plain = causal_attention(*args)
        with jax.set_mesh(mesh):
            cut = jax.jit(lambda *a: causal_attention(*a, "cudnn"), static_argnums=3)(*args)
        np.testing.assert_allclose(plain, cut, atol=1e-12)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_generation_on_a_mesh_gives_what_one_device_gives(x64, kind):
    prompts, found = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]], []
    first = first_params(make(kind, {"fsdp": 1}))
    for mesh, devices in (
        ({"fsdp": 1}, jax.devices()[:1]),
        (MESHES["fsdp 2, tensor 2, context 2"], jax.devices()),
    ):
        config, placed = on(make(kind, mesh), devices)
        with jax.set_mesh(placed):
            params = jax.device_put(first, layout.param_shardings(config.model, placed))
            model = LoadedModel(config, ByteTokenizer(), params, placed, 0)
        results = model.generate(prompts, 8, temperature=1.0)
        found.append(([r.ids for r in results], [r.log_probs for r in results]))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-12)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 16}, r"The mesh \(fsdp 16\) needs 16 devices, but there are 8"),
        ({"tensor": 3}, "does not divide the 8 devices"),
        ({"fsdp": 2}, r"The mesh \(fsdp 2\) needs 2 devices, but there are 8; set one of"),
        ({"fsdp": -1, "tensor": -1}, "Only one of mesh.data, mesh.fsdp"),
        ({"fsdp": 0}, "mesh.fsdp must be positive or -1, got 0"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(mesh, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(make("ngpt", mesh))


@pytest.mark.parametrize(
    ("mesh", "fields", "message"),
    [
        (
            {"fsdp": 8}, {"model__heads": 16, "train__batch_size": 8},
            "mesh.fsdp = 8 does not divide head_dim = 4 of layers/key_kernel; try mesh.fsdp=4 and"
            " mesh.data=-1",
        ),
        (
            {"fsdp": 1, "tensor": 8}, {"model__heads": 4},
            "mesh.tensor = 8 does not divide heads = 4 of layers/out_kernel; try mesh.tensor=4 and"
            " mesh.fsdp=-1",
        ),
        (
            {"fsdp": 1, "tensor": 8}, {"model__vocab_multiple": 1},
            "mesh.tensor = 8 does not divide vocab = 257 of input_embedding; set"
            " model.vocab_multiple to a multiple of 8",
        ),
        (
            {"fsdp": 1, "tensor": 8}, {"model__kv_heads": 4},
            r"layers/key_kernel .* would lie whole on each of the 8 devices",
        ),
        ({"fsdp": 8}, {"train__batch_size": 12}, "train.batch_size = 12 is not divisible by the 8"),
        (
            {"fsdp": 4, "tensor": 2}, {"train__accumulate": 4},
            "not divisible by the 4 devices of mesh.data . mesh.fsdp in 4 microbatches; the next"
            " that is: 16",
        ),
        (
            {"fsdp": 1, "context": 8}, {"model__context": 60},
            "model.context = 60 is not divisible by mesh.context = 8",
        ),
    ],
)  # fmt: skip
def test_models_that_a_mesh_cannot_cut_are_refused(mesh, fields, message):
    with pytest.raises(ConfigError, match=message):
        on(make("ngpt", mesh, **fields), jax.devices())


def test_kv_heads_that_do_not_divide_stay_whole():
    config, mesh = on(make("ngpt", {"fsdp": 2, "tensor": 4}, model__kv_heads=2), jax.devices())
    specs = layout.param_shardings(config.model, mesh)["layers"]
    assert specs["key_kernel"].spec == P(None, None, None, "fsdp")
    assert specs["query_kernel"].spec == P(None, None, "tensor", "fsdp")
    table = layout.parameter_table(config, mesh)
    row = next(line for line in table.splitlines() if line.startswith("layers/up_kernel"))
    assert "-, -, tensor*fsdp" in row
    assert row.endswith(f"{2 * 64 * 256 * 8 / 8 / 1024:.1f} KiB")
