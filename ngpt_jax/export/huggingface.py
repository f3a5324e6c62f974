"""A trained model as a Hugging Face folder that transformers loads, and back to a run's folder.

Names in model.safetensors, N counting layers from 0 (matrices are torch's, (out, in)):

  model.embed_tokens.weight, lm_head.weight   (vocab, embed), without rows of padding
  model.layers.N.self_attn.{q,k,v}_proj.weight   (heads * head_dim, embed), RoPE on halves
  model.layers.N.self_attn.o_proj.weight         (embed, heads * head_dim)
  model.layers.N.mlp.{up,gate}_proj.weight       (mlp, embed): u and v of SwiGLU(u, v) = u SiLU(v)
  model.layers.N.mlp.down_proj.weight            (embed, mlp)
  nGPT: model.layers.N.{alpha_a, alpha_m}; model.layers.N.self_attn.s_qk (kv_heads, head_dim),
    model.layers.N.mlp.{s_u, s_v} and s_z, or, where scales are folded,
    model.layers.N.self_attn.folded_qk_scale (heads, head_dim)
  GPT: model.layers.N.{attention_norm, mlp_norm}.weight, model.norm.weight; with QK-norm
    model.layers.N.self_attn.{q_norm, k_norm}.weight

Scales are the raw ones: config.json has the factors (scale_factors), and the whole config of the
training under ngpt_jax.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ngpt_jax import __version__
from ngpt_jax import config as config_lib
from ngpt_jax.config import ConfigError, ModelConfig, experiment
from ngpt_jax.decoding import folding
from ngpt_jax.export import hf_tokenizer
from ngpt_jax.export.folders import Imported, new_output
from ngpt_jax.export.reference_layout import pad_vocab
from ngpt_jax.files import reason
from ngpt_jax.inference.opening import OpenedRun, check_tokenizer
from ngpt_jax.model.params import FOLDED_MARK, TABLE, axis_sizes, param_list, real_vocab
from ngpt_jax.training.loop import enable_x64_if_used
from ngpt_jax.training.setup import with_tokenizer

MODEL_TYPE = "ngpt_jax"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # of weights that transformers saved in parts
_SCALES = ("alpha_a", "alpha_m", "s_qk", "s_u", "s_v", "s_z")
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
    """One of theirs: our parameter, its layer (None outside the blocks), axes and sizes in it."""

    ours: str
    layer: int | None
    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def turned(self) -> bool:
        """Whether it is a Linear's weight: all axes but embed are made one, out comes first."""
        return TABLE[self.ours].is_matrix and "vocab" not in self.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of theirs."""
        if not self.turned:
            return self.sizes
        first, rest = self.sizes[0], int(np.prod(self.sizes[1:]))
        if self.axes[0] != "embed":
            first, rest = int(np.prod(self.sizes[:-1])), self.sizes[-1]
        return rest, first


def _tensors(config: ModelConfig) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of theirs by its name."""
    sizes = axis_sizes(config) | {"vocab": config.vocab_size}
    for path, axes in ((p.path, p.axes) for p in param_list(config)):
        ours = path.removeprefix("layers/")
        if ours == path:
            yield _NAMES[ours], _Tensor(path, None, axes, tuple(sizes[a] for a in axes))
            continue
        shape = tuple(sizes[a] for a in axes[1:])
        for layer in range(config.layers):
            name = f"model.layers.{layer}.{_NAMES[ours]}"
            yield name, _Tensor(ours, layer, axes[1:], shape)


def to_torch(config: ModelConfig, params: Any, dtype: str) -> dict[str, np.ndarray]:
    """Parameters under their names; scales and gains are float32 whatever the dtype."""
    out = {}
    for name, t in _tensors(config):
        w = params[t.ours] if t.layer is None else params["layers"][t.ours][t.layer]
        w = np.asarray(real_vocab(w, t.axes, config))
        w = w.reshape(t.shape[::-1]).T if t.turned else w
        wanted = dtype if TABLE[t.ours].is_matrix else "float32"
        out[name] = np.ascontiguousarray(w.astype(jnp.dtype(wanted)))
    return out


def from_torch(where: str, config: ModelConfig, theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of :func:`to_torch`; raises ConfigError for other names or shapes.

    Rows of padding are made anew: in nGPT's tables the first basis vector, else 0 (in s_z its
    starting value); their logits are masked out.
    """
    check_tensors(where, {name: t.shape for name, t in _tensors(config)}, theirs)
    dtype = jnp.dtype(config.param_dtype)
    params: dict[str, Any] = {"layers": {}}
    for name, t in _tensors(config):
        w = np.asarray(theirs[name])
        w = (w.T.reshape(t.sizes) if t.turned else w).astype(dtype)
        if t.layer is not None:
            params["layers"].setdefault(t.ours, []).append(w)
        else:
            fill = config.s_z.scale if t.ours == "s_z" else 0
            params[t.ours] = pad_vocab(w, config, fill or 0) if "vocab" in t.axes else w
    params["layers"] = {ours: np.stack(ws) for ours, ws in params["layers"].items()}
    return params


def check_tensors(
    where: str, wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, Any]
) -> None:
    """Refuses the first tensor that is missing, too much or of another shape."""
    for name in [*wanted, *there]:
        if name not in there:
            raise ConfigError(f"{where} lacks the tensor {name}, which is {wanted[name]} here.")
        shape = tuple(there[name].shape)
        if name not in wanted:
            raise ConfigError(f"{where} has a tensor {name} {shape}, which this model has not.")
        if shape != wanted[name]:
            raise ConfigError(f"{where}: the tensor {name} is {shape}, not {wanted[name]}.")


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that the PyTorch model reads."""
    scales = {name: getattr(config, name) for name in _SCALES}
    raw = config.kind == "ngpt"
    return {
        "kind": config.kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rope_base": config.rope_base,
        "qk_norm": config.qk_norm,
        "rms_norm_eps": config.rms_eps,
        "folded": config.folded,
        "normalize_on_read": config.normalize_on_read,
        "scale_factors": {n: s.init / s.scale for n, s in scales.items()} if raw else {},
    }


def write_folder(
    run: OpenedRun, path: str, dtype: str = "float32", fold: bool = False
) -> list[str]:
    """Writes ``--to_hf``.

    Args:
      run: opened.
      path: of the folder, new or empty.
      dtype: of the matrices, float32 or bfloat16.
      fold: multiply nGPT's scales into them.

    Returns:
      Notes on what is not as one may expect.

    Raises ConfigError: GPT cannot be folded; it cannot be written.
    """
    config, params = run.config, run.params
    if fold and config.model.kind == "gpt":
        raise ConfigError("--folded: GPT (model.kind=gpt) has no scales to fold; leave it out.")
    if fold and not config.model.folded:
        params = folding.fold(config.model, params)
        model = folding.folded_config(config.model)
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
            "torch_dtype": dtype,  # as it was called before
            **_architecture(config.model),
            **ids,
            "tie_word_embeddings": False,
            "ngpt_jax": {
                "version": __version__,
                "step": run.step,
                "tokenizer": facts,
                "config": dataclasses.asdict(config),
            },
        }
        _write_json(folder / "config.json", values)
        _write_json(folder / "generation_config.json", {**ids, "pad_token_id": eod})
        for name in ("configuration_ngpt.py", "modeling_ngpt.py"):
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
        try:
            safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / WEIGHTS)  # which is for the user alone
        except safetensors.SafetensorError as e:  # of a full disk too
            raise ConfigError(f"--to_hf={path} cannot be written: {reason(e)}.") from e
    return notes


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_folder(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Imported:
    """Reads ``--from_hf``: a folder of :func:`write_folder`, also one that transformers saved anew.

    Args:
      path: of the folder.
      overrides: (dotted name, text), where another copy of the tokenizer lies, say.

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
        saved = config_lib.from_config_dict(facts["config"])
        fingerprint, file = facts["tokenizer"]["fingerprint"], facts["tokenizer"]["file"]
        if not (isinstance(fingerprint, str) and isinstance(file, str | None)):
            raise TypeError("tokenizer is not told by texts")
    except (KeyError, TypeError, AttributeError, ConfigError) as e:
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
                f" training, under ngpt_jax, {value!r}; they must be of one model."
            )
    config, tokenizer = with_tokenizer(config)
    check_tokenizer(where, config, tokenizer, fingerprint)
    enable_x64_if_used(config)
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
    """All tensors, of one file or of the parts that an index names."""
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
            raise ConfigError(f"{where} is not whole: {name} must be in it.") from None
        except (OSError, safetensors.SafetensorError, AttributeError, KeyError) as e:
            # The last two: of a dtype that numpy has not.
            raise ConfigError(f"{where}: {name} cannot be read ({reason(e)}).") from e
    return tensors
