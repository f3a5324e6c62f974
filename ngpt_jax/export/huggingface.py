"""A trained model as a Hugging Face folder that transformers loads, and back to a run's folder.

Names in model.safetensors, N counting layers from 0 (matrices are torch's, (out, in)):

  model.embed_tokens.weight, lm_head.weight   (vocab, embed), without rows of padding
  model.layers.N.self_attn.{q,k,v}_proj.weight   (heads * head_dim, embed), RoPE on halves
  model.layers.N.self_attn.o_proj.weight         (embed, heads * head_dim)
  model.layers.N.mlp.{up,gate}_proj.weight       (mlp, embed): u and v of SwiGLU(u, v) = u SiLU(v)
  model.layers.N.mlp.down_proj.weight            (embed, mlp)
and, where the model has them,
  model.layers.N.{alpha_a, alpha_m}, model.layers.N.self_attn.s_qk (kv_heads, head_dim),
    model.layers.N.mlp.{s_u, s_v}, s_z: learned scales
  model.layers.N.self_attn.folded_qk_scale (heads, head_dim): where scales are folded
  model.layers.N.{attention_norm, mlp_norm}.weight, model.norm.weight,
    model.layers.N.self_attn.{q_norm, k_norm}.weight: gains of RMSNorm

Scales are stored as the training stores them. config.json has the factors that give their
effective values (scale_factors), and under ngpt_jax the whole config of the training.
"""

import dataclasses
import json
import math
import operator
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ngpt_jax import config as config_lib
from ngpt_jax.config import ConfigError, ModelConfig, command, experiment
from ngpt_jax.config.fields import SCALES
from ngpt_jax.config.presets import PRESETS
from ngpt_jax.data.tokenizers.base import check_tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.export import hf_tokenizer
from ngpt_jax.export.folders import Imported, new_output
from ngpt_jax.export.reference_layout import pad_vocab
from ngpt_jax.files import reason
from ngpt_jax.inference.loading import LoadedModel
from ngpt_jax.model import folding
from ngpt_jax.model.params import FOLDED_MARK, Param, param_list, real_vocab, scale_factor
from ngpt_jax.parallel.backend import enable_x64_if_used
from ngpt_jax.training.workdir import versions

MODEL_TYPE = "ngpt_jax"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # there where transformers saved the weights in parts
_NAMES = {
    "input_embedding": "model.embed_tokens.weight",
    "output_embedding": "lm_head.weight",
    "s_z": "s_z",
    "final_norm": "model.norm.weight",
    "query_kernel": "self_attn.q_proj.weight",
    "key_kernel": "self_attn.k_proj.weight",
    "value_kernel": "self_attn.v_proj.weight",
    "out_kernel": "self_attn.o_proj.weight",
    "s_qk": "self_attn.s_qk",
    FOLDED_MARK: "self_attn.folded_qk_scale",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "up_kernel": "mlp.up_proj.weight",
    "gate_kernel": "mlp.gate_proj.weight",
    "down_kernel": "mlp.down_proj.weight",
    "s_u": "mlp.s_u",
    "s_v": "mlp.s_v",
    "alpha_a": "alpha_a",
    "alpha_m": "alpha_m",
    "attention_norm": "attention_norm.weight",
    "mlp_norm": "mlp_norm.weight",
}


class _Tensor(NamedTuple):
    """A tensor of the folder: our parameter, and its layer (None outside the blocks)."""

    param: Param
    layer: int | None
    sizes: tuple[int, ...]  # of our parameter in one layer, without rows of padding

    @property
    def is_linear(self) -> bool:
        """Whether it is a Linear's weight: (out, in), where all axes but embed are made one."""
        return self.param.is_matrix and "vocab" not in self.param.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """In the folder."""
        if not self.is_linear:
            return self.sizes
        split = -1 if self.param.axes[-1] == "embed" else 1
        return math.prod(self.sizes[split:]), math.prod(self.sizes[:split])


def _tensors(config: ModelConfig) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of a folder by its name."""
    exact = dataclasses.replace(config, vocab_multiple=1)
    for param in param_list(config):
        name, sizes = _NAMES[param.name], param.shape(exact)
        if "layers" not in param.axes:
            yield name, _Tensor(param, None, sizes)
            continue
        for layer in range(config.layers):
            yield f"model.layers.{layer}.{name}", _Tensor(param, layer, sizes[1:])


def to_torch(config: ModelConfig, params: Any, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of a folder by name: matrices in ``dtype``, scales and gains in float32."""
    out = {}
    for name, t in _tensors(config):
        tree = params if t.layer is None else params["layers"]
        w = np.asarray(real_vocab(tree[t.param.name], t.param.axes, config))
        w = w if t.layer is None else w[t.layer]
        w = w.reshape(t.shape[::-1]).T if t.is_linear else w
        wanted = dtype if t.param.is_matrix else "float32"
        out[name] = np.ascontiguousarray(w.astype(jnp.dtype(wanted)))
    return out


def from_torch(where: str, config: ModelConfig, theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of :func:`to_torch`; raises ConfigError for other names or shapes.

    Rows of padding are made anew, see :func:`pad_vocab`.
    """
    check_tensors(where, {name: t.shape for name, t in _tensors(config)}, theirs)
    dtype = jnp.dtype(config.param_dtype)
    params: dict[str, Any] = {"layers": {}}
    for name, t in _tensors(config):
        w, ours = np.asarray(theirs[name]), t.param.name
        w = (w.T.reshape(t.sizes) if t.is_linear else w).astype(dtype)
        if t.layer is not None:
            params["layers"].setdefault(ours, []).append(w)
        else:
            params[ours] = pad_vocab(ours, w, t.param.axes, config)
    params["layers"] = {ours: np.stack(ws) for ours, ws in params["layers"].items()}
    return params


def check_tensors(
    where: str, wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, Any]
) -> None:
    """Refuses the first tensor that is missing, not wanted or of another shape."""
    for name in [*wanted, *there]:
        if name not in there:
            raise ConfigError(f"{where} lacks the tensor {name}, which is {wanted[name]} here.")
        shape = tuple(there[name].shape)
        if name not in wanted:
            raise ConfigError(f"{where} has a tensor {name} {shape}, which this model has not.")
        if shape != wanted[name]:
            raise ConfigError(f"{where}: the tensor {name} is {shape}, not {wanted[name]}.")


def choices(config: ModelConfig) -> dict[str, Any]:
    """What a model computes: its fields that presets fill in, by dotted name ("alpha_a.form").

    init_std is left out: it has no effect on a trained model.
    """
    filled_in = dict.fromkeys(name for preset in PRESETS.values() for name in preset)
    names = [n.removeprefix("model.") for n in filled_in if n.startswith("model.")]
    return {n: operator.attrgetter(n)(config) for n in names if n != "init_std"}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that the PyTorch model reads."""
    scales = {name: getattr(config, name) for name in SCALES}
    return {
        "kind": config.kind,
        "choices": choices(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rope_base": config.rope_base,
        "rms_norm_eps": config.rms_eps,
        "folded": config.folded,
        "normalize_on_read": config.normalize_on_read,
        "scale_factors": {
            n: scale_factor(config, n) for n, s in scales.items() if s.form != "none"
        },
    }


def write_folder(
    run: LoadedModel, path: str, dtype: str = "float32", fold: bool = False
) -> list[str]:
    """Writes ``--to_hf``.

    Args:
      run: opened.
      path: of the folder, new or empty.
      dtype: of the matrices, float32 or bfloat16.
      fold: multiply the scales into them.

    Returns:
      Notes on what a user may not expect.

    Raises ConfigError: there are no scales to fold; the folder cannot be written.
    """
    config, params = run.config, run.params
    if fold and not config.model.folded:
        model = folding.folded_config(config.model)
        if not model.folded:
            raise ConfigError(
                f"--folded: this model (model.kind={model.kind}) has no scales to fold; leave it"
                " out."
            )
        params = folding.fold(config.model, params)
        config = dataclasses.replace(config, model=model)
    tensors = to_torch(config.model, params, dtype)
    eod = run.tokenizer.eod
    ids = {"bos_token_id": eod, "eos_token_id": eod}  # a document begins at the end of another
    with new_output("to_hf", path) as folder:
        folder.mkdir()
        facts, notes = hf_tokenizer.write(folder, config.data, run.tokenizer, config.model.context)
        if dtype == "float32" and config.model.param_dtype == "float64":
            notes.append("The weights are float64; the folder holds them rounded to float32.")
        values = {
            "model_type": MODEL_TYPE,
            "architectures": ["NGPTForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_ngpt.NGPTConfig",
                "AutoModel": "modeling_ngpt.NGPTModel",
                "AutoModelForCausalLM": "modeling_ngpt.NGPTForCausalLM",
            },
            "dtype": dtype,
            "torch_dtype": dtype,  # its name in older versions of transformers
            **_architecture(config.model),
            **ids,
            "tie_word_embeddings": False,
            "ngpt_jax": {
                "version": versions()["ngpt-jax"],
                "step": run.step,
                "tokenizer": facts,
                "config": dataclasses.asdict(config),
            },
        }
        command.write_json(str(folder / "config.json"), values)
        command.write_json(str(folder / "generation_config.json"), ids | {"pad_token_id": eod})
        for name in ("configuration", "functions", "modeling"):
            shutil.copy(Path(__file__).with_name(f"{name}_ngpt.py"), folder)
        try:
            safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            # safetensors writes a file that its owner alone can read.
            shutil.copymode(folder / "config.json", folder / WEIGHTS)
        except safetensors.SafetensorError as e:  # a full disk, too
            raise ConfigError(f"--to_hf={path} cannot be written: {reason(e)}.") from e
    return notes


def read_folder(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Imported:
    """Reads ``--from_hf``: a folder of :func:`write_folder`, or one that transformers saved.

    Args:
      path: of the folder.
      overrides: (dotted name, text) of fields of the config, such as data.tokenizer.

    Raises ConfigError.
    """
    where, folder = f"--from_hf={path}", Path(path).expanduser()
    values = _read_json(where, folder / "config.json")
    if values.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"{where} is of model_type {values.get('model_type')!r}, not {MODEL_TYPE}; give a"
            " folder that --to_hf wrote."
        )
    facts = values.get("ngpt_jax") or {}
    try:
        saved = config_lib.from_saved(json.dumps(facts["config"]))
        fingerprint, file = facts["tokenizer"]["fingerprint"], facts["tokenizer"]["file"]
        if not (isinstance(fingerprint, str) and isinstance(file, str | None)):
            raise TypeError("tokenizer: fingerprint and file must be texts")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ConfigError(
            f"{where}: what config.json has under ngpt_jax cannot be read ({reason(e)}); give a"
            " folder that --to_hf wrote."
        ) from e
    if file is not None:
        data = dataclasses.replace(saved.data, tokenizer=str(folder.resolve() / file))
        saved = dataclasses.replace(saved, data=data)
    config = experiment.load_config(config_lib.to_config_dict(saved), overrides)
    for name, value in _architecture(config.model).items():
        if values.get(name, value) != value:
            raise ConfigError(
                f"{where}: config.json says {name} = {values[name]!r}, but the config of the"
                f" training, under ngpt_jax, says {value!r}; they must be of one model."
            )
    config, tokenizer = with_tokenizer(config)
    check_tokenizer(tokenizer, fingerprint, where)
    enable_x64_if_used(config.model)
    params = from_torch(where, config.model, _read_weights(where, folder))
    return Imported(config, jax.tree.map(jnp.asarray, params), tokenizer)


def _read_json(where: str, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{where} is not a Hugging Face folder: {file.name} must be in it.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: {file.name} cannot be read ({reason(e)}).") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {file.name} is not a table of names and values.")
    return values


def _read_weights(where: str, folder: Path) -> dict[str, np.ndarray]:
    """All tensors, from one file or from the parts that an index names."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / _INDEX).exists():
        parts = _read_json(where, folder / _INDEX).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
            raise ConfigError(f"{where}: {_INDEX} has no weight_map from tensors to files.")
        names = sorted(set(parts.values()))
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        try:
            tensors |= safetensors.numpy.load_file(folder / name)
        except FileNotFoundError:
            raise ConfigError(f"{where} is not complete: {name} must be in it.") from None
        except (OSError, safetensors.SafetensorError, AttributeError, KeyError) as e:
            # The last two: numpy lacks the dtype.
            raise ConfigError(f"{where}: {name} cannot be read ({reason(e)}).") from e
    return tensors
