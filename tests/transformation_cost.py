"""What each transformation of the optimizer costs: python tests/transformation_cost.py [gpu] [N]

Without gpu: the time of a training step with the transformation over that of a step without it, 4
layers of width 256, 8 sequences of 256 bytes, medians of N steps made in turn, on a CPU. With gpu
(extra aot): the bytes that the transformation moves, alone in a program for an H100 that is not
there, for the parameters of 124M. They are told over those of its passes, where each sum is a pass
that reads what it needs once, and over those of a single pass that reads updates and parameters.
"""

import statistics
import sys
import time

import jax
import optax

from ngpt_jax.config import default_config, from_config_dict
from ngpt_jax.config.experiment import load_config
from ngpt_jax.directions import cap_angle, tangent, unit_step
from ngpt_jax.model.params import param_tree, unit_axes
from ngpt_jax.optim.recipes import make_optimizer
from ngpt_jax.projection import keep_params_on_sphere
from ngpt_jax.training.step import init_state, make_train_step


def transformations(model):
    """Name -> the transformation: those before the last one, and those that stand last."""
    axes = unit_axes(model)
    whole = jax.tree.map(
        lambda p: tuple(i for i, a in enumerate(p.axes) if a != "layers") if p.is_matrix else None,
        param_tree(model),
    )
    before = {
        "tangent": tangent(axes),
        "unit_step": unit_step(axes, 0.01),
        "cap_angle": cap_angle(axes, 0.1),
    }
    last = {
        "sphere": keep_params_on_sphere(axes),
        'radius="initial"': keep_params_on_sphere(axes, "initial"),
        "several axes": keep_params_on_sphere(whole, "initial"),
        "ball": keep_params_on_sphere(axes, mode="ball"),
        "brake": keep_params_on_sphere(axes, mode="brake", shares=(0.5, 1.0)),
        "exp": keep_params_on_sphere(axes, retraction="exp"),
    }
    return before, last


# Arrays of the size of the parameters that each pass reads or writes: the largest entries, the sums
# (of the vectors, then of what is tangent), and the result.
PASSES = {
    "tangent": 1 + 2 + 2 + 3,
    "unit_step": 2 + 2 + 3,
    "cap_angle": 1 + 2 + 2 + 3,
    "exp": 1 + 2 + 2 + 3,
}
PROJECTION = 2 + 2 + 3


def small(recipe="ngpt"):
    values = default_config()
    values.model.update(layers=4, width=256, heads=4, context=256, vocab_size=256)
    values.model.update(scan_layers=False, attention="xla", remat="none")
    values.train.update(steps=1000, batch_size=8)
    values.optimizer.recipe = recipe
    return from_config_dict(values)


def seconds_of_steps(rounds):
    """A line for each transformation: its step over the step without it, and the recipes'."""
    config = small()
    schedule = make_optimizer(config)[1]
    before, last = transformations(config.model)
    adam = optax.scale_by_adam(0.9, 0.95)

    def chain(*parts):
        return optax.with_extra_args_support(optax.chain(*parts))

    rate = optax.scale(-1e-3)
    programs = {"none": (config, chain(adam, rate))}
    for name, tx in before.items():
        order = (adam, rate, tx) if name == "cap_angle" else (adam, tx, rate)
        programs[name] = config, chain(*order)
    programs |= {name: (config, chain(adam, rate, tx)) for name, tx in last.items()}
    for recipe in ("ngpt", "muon", "ngpt2026", "adamh", "muonh", "lion", "sgd"):
        own = small(recipe)
        programs[f"recipe {recipe}"] = own, make_optimizer(own)[0]
    tokens = jax.random.randint(jax.random.key(0), (8, 257), 0, 256)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    runs, times = {}, {name: [] for name in programs}
    for name, (own, tx) in programs.items():
        step = jax.jit(make_train_step(own, tx, schedule), donate_argnums=0)
        state = init_state(own, tx)
        runs[name] = step, step(state, batch)[0]
    for _ in range(rounds):
        for name, (step, state) in runs.items():
            start = time.perf_counter()
            state = jax.block_until_ready(step(state, batch)[0])
            times[name].append(time.perf_counter() - start)
            runs[name] = step, state
    for name, own in times.items():
        of = "recipe ngpt" if name.startswith("recipe") else "none"
        ratio = statistics.median(a / b for a, b in zip(own, times[of]))
        print(f"{name:18s} {statistics.median(own) * 1e3:8.1f} ms  {ratio:6.3f} x {of}", flush=True)


def bytes_on_gpu():
    """A line for each transformation of 124M's parameters, alone in a program."""
    from ngpt_jax.aot import hlo
    from ngpt_jax.aot.topologies import GPU_COMPILER_OPTIONS, topology_devices

    config = load_config("experiments/124m.py", [("model.vocab_size", "32000")])
    here = jax.sharding.SingleDeviceSharding(topology_devices("h100:1")[0])
    params = jax.eval_shape(lambda: init_state(config, optax.identity()).params)

    def described(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    for group in transformations(config.model):
        for name, tx in group.items():
            state = jax.eval_shape(tx.init, params)

            def update(updates, state, params, tx=tx):
                updates, state = tx.update(updates, state, params)
                return optax.apply_updates(params, updates), state

            program = jax.jit(update, donate_argnums=(1, 2))
            text = program.lower(*described((params, state, params))).compile(GPU_COMPILER_OPTIONS)
            moved = hlo.analyze(text.as_text()).bytes_accessed
            array = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
            own = PASSES.get(name, PROJECTION) * array
            print(
                f"{name:18s} {moved / 1e9:6.3f} GB  {moved / own:5.2f} x its passes"
                f"  {moved / (3 * array):5.2f} x one pass", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    if "gpu" in sys.argv[1:]:
        bytes_on_gpu()
    else:
        seconds_of_steps(*(numbers or [15]))
