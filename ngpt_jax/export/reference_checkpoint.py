"""Checkpoints in the layout of the authors' PyTorch code, read and written.

A file is what torch.save makes of the state dict, or of a dict that has the state dict under
"model" and its shape under "model_args", as nanoGPT saves it. Names may have torch.compile's
prefix. Files are read with ``weights_only=True`` alone, which runs no code of theirs. The layout
has a place for the paper's nGPT and GPT, and for no other choices of the config.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngpt_jax import config as config_lib
from ngpt_jax import sphere
from ngpt_jax.config import Config, ConfigError, ModelConfig, experiment
from ngpt_jax.config.fields import Scale
from ngpt_jax.data.tokenizers.base import ByteTokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.errors import install_hint
from ngpt_jax.export.folders import Imported, new_output
from ngpt_jax.export.huggingface import check_tensors, choices
from ngpt_jax.export.reference_layout import from_reference, to_reference
from ngpt_jax.files import reason
from ngpt_jax.inference.loading import LoadedModel
from ngpt_jax.model.params import Param, param_tree, scale_factor
from ngpt_jax.parallel.backend import enable_x64_if_used

POSITION_NOTE = (
    "the released code's own position operator is not RoPE: weights trained with it do not"
    " give its logits here; those trained with standard RoPE do."
)
# model_args -> field of model.
_ARGUMENTS = {
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
    "vocab_size": "vocab_size",
    "block_size": "context",
}


def require_torch(flag: str) -> Any:
    """The module torch."""
    try:
        import torch
    except ImportError as e:
        raise ConfigError(f"--{flag} needs PyTorch: {install_hint('torch')}.") from e
    return torch


def read(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Imported:
    """Reads ``--from_reference``.

    Args:
      path: of the file.
      overrides: (dotted name, text) of fields of the config, above all of those that the file
        does not tell: model.heads, model.context, data.tokenizer.

    Raises ConfigError.
    """
    where = f"--from_reference={path}"
    state, arguments = _load(where, Path(path).expanduser())
    config = _config(where, state, arguments, overrides)
    _check_choices(where, config.model)
    config, tokenizer = with_tokenizer(config)
    check_tensors(where, _shapes(config.model), state)
    enable_x64_if_used(config.model)
    params = from_reference(state, config.model)
    params = jax.tree.map(lambda w: jnp.asarray(w, config.model.param_dtype), params)
    return Imported(config, params, tokenizer)


def _load(where: str, file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by name, without torch.compile's prefix, and model_args."""
    torch = require_torch("from_reference")
    if not file.is_file():
        raise ConfigError(f"{where}: there is no such file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file that is no checkpoint is told below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {reason(e)}.") from e
    except Exception as e:  # a damaged file raises many kinds
        if "Unsupported global" in str(e):  # a file that is no pickle: "Unsupported operand"
            raise ConfigError(
                f"{where} holds other objects than tensors, numbers and texts, which are not"
                " loaded, as they may run any code; save the state dict alone."
            ) from e
        raise ConfigError(f"{where} is not a file of torch.save, or is damaged.") from e
    content = content if isinstance(content, Mapping) else {}
    state, arguments = content.get("model", content), content.get("model_args")
    tensors = {
        str(name).removeprefix("_orig_mod."): w
        for name, w in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(w, torch.Tensor)
    }
    if not {"transformer.wte.weight", "lm_head.weight"} <= set(tensors):
        raise ConfigError(
            f"{where} has no tensors transformer.wte.weight and lm_head.weight, neither at the top"
            " nor under 'model': it is not of the authors' layout."
        )
    for name, w in tensors.items():
        if w.layout != torch.strided or w.is_meta or not w.dtype.is_floating_point:
            raise ConfigError(
                f"{where}: the tensor {name} is {'meta' if w.is_meta else w.dtype}, {w.layout};"
                " save plain tensors of floating point numbers."
            )
    found = {
        name: (w if w.dtype == torch.float64 else w.float()).detach().numpy()
        for name, w in tensors.items()
    }
    return found, dict(arguments) if isinstance(arguments, Mapping) else {}


def _config(
    where: str,
    state: Mapping[str, np.ndarray],
    arguments: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]],
) -> Config:
    """From shapes, model_args and overrides, which may not contradict one another."""
    given, scaled = dict(overrides), "sz" in state
    known = _from_shapes(where, state)
    for name, field in _ARGUMENTS.items():
        value = arguments.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise ConfigError(f"{where}: model_args has {name} = {value!r}, which is no number.")
        if known.setdefault(field, value) != value:
            raise ConfigError(
                f"{where}: model_args has {name} = {value}, but its tensors are of {known[field]}."
            )
    use = arguments.get("use_nGPT")
    if use is not None and bool(use) != scaled:
        there = "are" if scaled else "are no"
        raise ConfigError(f"{where}: model_args has use_nGPT = {use}, but there {there} scales sz.")
    for field, meaning in (("heads", "query heads"), ("context", "tokens of a training sequence")):
        if field not in known and f"model.{field}" not in given:
            raise ConfigError(
                f"--config.model.{field} is needed: {where} does not tell the number of {meaning}."
            )
    if "data.tokenizer" not in given and known["vocab_size"] != ByteTokenizer().vocab_size:
        raise ConfigError(
            f"--config.data.tokenizer is needed: {where} does not name the tokenizer of its"
            f" {known['vocab_size']} token ids."
        )
    heads = str(known.get("heads", given.get("model.heads")))
    if not heads.isdecimal() or int(heads) == 0:
        raise ConfigError(f"--config.model.heads wants a number, got {heads!r}.")
    known |= _from_heads(where, state, int(heads))
    for field, value in known.items():
        text = given.get(f"model.{field}", str(value))
        if text.replace("_", "").lower() != str(value).lower():
            raise ConfigError(
                f"--config.model.{field}={text} contradicts {where}, which has {value}; leave it"
                " out."
            )
    values = config_lib.default_config()
    values.train.steps = 1  # no effect: a run cannot be resumed from here
    values.model.update(known)
    base = arguments.get("base_scale")
    if scaled and isinstance(base, float):
        for name in ("alpha_a", "alpha_m", "s_qk", "s_z"):
            values.model[name].scale = base
    return experiment.load_config(values, overrides)


def _from_shapes(where: str, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of model that the shapes alone tell."""
    table, down = (_matrix(where, state, n) for n in ("wte", "h.0.mlp_c_proj"))
    (vocab_size, width), mlp_width = table.shape, down.shape[1]
    blocks = [n.split(".") for n in state if n.startswith("transformer.h.")]
    layers = 1 + max((int(b[2]) for b in blocks if b[2].isdecimal()), default=-1)
    return {
        "kind": "ngpt" if "sz" in state else "gpt", "layers": layers, "width": width,
        "vocab_size": vocab_size, "mlp_width": mlp_width, "folded": False,
    }  # fmt: skip


def _from_heads(where: str, state: Mapping[str, np.ndarray], heads: int) -> dict[str, int]:
    query, key = (len(_matrix(where, state, f"h.0.{name}")) for name in ("query", "key"))
    head_dim, rest = divmod(query, heads)
    if rest or head_dim == 0 or key % head_dim:
        raise ConfigError(
            f"{where}: {heads} heads do not divide its {query} query and {key} key channels; give"
            " the right --config.model.heads."
        )
    return {"head_dim": head_dim, "kv_heads": key // head_dim}


def _matrix(where: str, state: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    name = f"transformer.{name}.weight"
    if name not in state or state[name].ndim != 2:
        raise ConfigError(f"{where} lacks the matrix {name}.")
    return state[name]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a file, from a small stand-in: one layer, one byte a number."""
    one = dataclasses.replace(config, layers=1)
    params = jax.tree.map(lambda p: np.zeros(p.shape(one), bool), param_tree(one))
    shapes = {name: w.shape for name, w in to_reference(params, one).items()}
    return {
        name.replace(".h.0.", f".h.{layer}."): shape
        for layer in range(config.layers)
        for name, shape in shapes.items()
    }


def _check_choices(where: str, model: ModelConfig) -> None:
    """Refuses a model whose choices are not exactly those of the paper's nGPT or of its GPT."""
    differences = []
    for preset in ("ngpt", "gpt"):
        known = config_lib.from_config_dict({"model": {"kind": preset}, "train": {"steps": 1}})
        theirs, own = choices(known.model), choices(model)
        differences.append([f"model.{n}={own[n]} in {preset}" for n in own if own[n] != theirs[n]])
    nearest = min(differences, key=len)
    if nearest:
        raise _no_place(where, nearest[0])


def _no_place(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where}: the authors' layout has no place for {what}.")


def write(run: LoadedModel, path: str) -> list[str]:
    """Writes ``--to_reference``: {"model": state dict, "model_args": its shape}, in float32.

    The authors' code has constants for init and scale of each learned scale (init 0.05 or 1, scale
    base_scale or 1). Where this run has others, the stored numbers are converted.

    Returns:
      Notes on what the authors' code cannot load.

    Raises ConfigError: the layout has no place for this model; the file cannot be written.
    """
    flag, model = "--to_reference", run.config.model
    torch = require_torch("to_reference")
    if model.folded:
        raise _no_place(flag, "scales that are folded in (model.folded); convert the raw weights")
    _check_choices(flag, model)
    if model.rope_base != 10000:
        raise _no_place(flag, f"model.rope_base={model.rope_base}, only for 10000")
    if model.pre_norm == "rms" and model.rms_eps != 1e-6:
        raise _no_place(flag, f"model.rms_eps={model.rms_eps}, only for 1e-06")
    base_scale = model.width**-0.5
    state = to_reference(_as_theirs(model, run.params, base_scale), model)
    arguments: dict[str, Any] = {name: getattr(model, field) for name, field in _ARGUMENTS.items()}
    arguments |= {"use_nGPT": int("sz" in state), "base_scale": base_scale}
    tensors = {
        name: torch.from_numpy(np.array(w, np.float32, order="C")) for name, w in state.items()
    }
    with new_output("to_reference", path) as file:
        try:
            torch.save({"model": tensors, "model_args": arguments}, file)
        except RuntimeError as e:  # from torch's own writer
            raise ConfigError(f"--to_reference={path} cannot be written: {reason(e)}.") from e
    usual = (model.heads, model.width // model.heads, 4 * model.width)
    if (model.kv_heads, model.head_dim, model.mlp_width) == usual:
        return []
    return [
        "the authors' code has no model of these kv_heads, head_dim or mlp_width;"
        " --from_reference reads it."
    ]


def _as_theirs(model: ModelConfig, params: Any, base_scale: float) -> Any:
    """Parameters that give the same model under the authors' constants."""
    constants = {name: Scale(1.0, base_scale) for name in ("s_qk", "s_z")}
    constants |= {name: Scale(0.05, base_scale) for name in ("alpha_a", "alpha_m")}
    constants |= {name: Scale(1.0, 1.0) for name in ("s_u", "s_v")}

    def change(w: jax.Array, param: Param) -> jax.Array:
        if model.normalize_on_read and param.unit_axis is not None:
            return sphere.normalize(w, param.unit_axis)
        theirs = constants.get(param.name)
        if theirs is None:
            return w
        assert theirs.scale is not None
        factor = scale_factor(model, param.name)
        same = factor == theirs.init / theirs.scale
        return w if same else w * (factor * theirs.scale / theirs.init)

    return jax.tree.map(change, params, param_tree(model))
