"""The programs of training and of generation, compiled for devices that need not exist."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ngpt_jax.aot.topologies import GPU_COMPILER_OPTIONS
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.decoding import folding
from ngpt_jax.decoding.cache import CHUNK
from ngpt_jax.decoding.generation import BUCKET
from ngpt_jax.decoding.prefill import prefill
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.decoding.step import decode
from ngpt_jax.errors import install_hint
from ngpt_jax.files import write_atomically
from ngpt_jax.parallel import rules
from ngpt_jax.training import layout


class Compiled(NamedTuple):
    lowered: jax.stages.Lowered
    compiled: Any  # a jax.stages.Compiled
    seconds: float  # of lowering and compiling


class Texts(NamedTuple):
    """What is generated at one time: rows, tokens of a prompt, tokens to generate for each."""

    rows: int
    prompt: int
    tokens: int

    @property
    def width(self) -> int:
        """Of the padded prompts."""
        return -(-self.prompt // BUCKET) * BUCKET

    @property
    def slots(self) -> int:
        """Of the cache, as generation.generate makes it."""
        return self.width + -(-self.tokens // BUCKET) * BUCKET


def compile_step(config: Config, mesh: Mesh, lowered_to: str | None = None) -> Compiled:
    """Compiles the training step for a mesh.

    Args:
      config: resolved, with its vocabulary and kernel decided (layout.for_mesh).
      mesh: of devices that need not exist.
      lowered_to: a file to which the StableHLO text of the step is written.

    Raises ConfigError where a part of the compiler is not installed.
    """
    return _compile(functools.partial(layout.lower_train_step, config, mesh), mesh, lowered_to)


def compile_generation(
    name: str, config: Config, mesh: Mesh, texts: Texts, lowered_to: str | None = None
) -> Compiled:
    """Compiles the "prefill" or "decode" of generation.generate, with the weights of inference.

    The other arguments and errors are those of :func:`compile_step`.
    """
    model = config.model
    with jax.set_mesh(mesh):
        fold = jax.jit(functools.partial(folding.for_inference, model))
        weights = _made_by(fold.lower, layout.abstract_params(model, mesh), mesh=mesh)
        rows = jax.ShapeDtypeStruct((texts.rows,), jnp.int32)
        tokens = rows.update(shape=(texts.rows, texts.width))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), texts.rows))
        keys = keys.update(sharding=rules.replicated(mesh))
        prompts = tokens, rows, texts.slots, keys
        read = functools.partial(prefill.lower, model, weights, *prompts)
        if name == "prefill":
            return _compile(read, mesh, lowered_to)
        # The decoder is laid out as prefill leaves it, which its compiled program tells.
        decoder = _made_by(read, mesh=mesh)
        how = Sampling(temperature=0.8)  # the default of LoadedModel.generate
        draw = functools.partial(decode.lower, model, weights, decoder, CHUNK, how, -1)
        return _compile(draw, mesh, lowered_to)


def _made_by(lower: Callable[..., jax.stages.Lowered], *args: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a program's results."""
    program = _compile(functools.partial(lower, *args), mesh, None)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        program.lowered.out_info, program.compiled.output_shardings,
    )  # fmt: skip


def _compile(lower: Callable[[], jax.stages.Lowered], mesh: Mesh, to: str | None) -> Compiled:
    start = time.perf_counter()
    with _missing_parts():
        lowered = lower()
        if to:
            write_atomically(Path(to), lowered.as_text())
        gpu = mesh.devices.flat[0].platform == "gpu"
        compiled = lowered.compile(GPU_COMPILER_OPTIONS if gpu else None)
    return Compiled(lowered, compiled, time.perf_counter() - start)


@contextlib.contextmanager
def _missing_parts() -> Iterator[None]:
    """Tells in one line which part of the GPU compiler is not installed."""
    try:
        yield
    except RuntimeError as e:  # jaxlib's errors too
        text = str(e)
        if "cuDNN not found" in text:
            raise ConfigError(
                "cuDNN is not installed, which model.attention = cudnn (auto's choice on GPUs)"
                " needs to compile: pip install nvidia-cudnn-cu13, or set model.attention=xla."
            ) from e
        if "libdevice not found" in text or "No PTX compilation provider" in text:
            raise ConfigError(
                f"ptxas or libdevice is not installed (nvidia-cuda-nvcc): {install_hint('aot')}."
            ) from e
        raise
