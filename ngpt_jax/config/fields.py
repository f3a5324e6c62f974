"""Every field of a run's config, with the facts about it (facts.py).

A field whose default is None may also be one that the kind's preset fills in (presets.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngpt_jax.config.facts import (
    ANY,
    AXIS,
    BETWEEN_0_AND_1,
    FOLDER,
    FREE,
    NEUTRAL,
    NOT_NEGATIVE,
    OWN,
    POSITIVE,
    SCHEDULE,
    SEED,
    TEXT,
    field,
    one_of,
    section,
)
from ngpt_jax.config.optimizer import OptimizerConfig
from ngpt_jax.config.sources import SOURCES


@dataclasses.dataclass(frozen=True)
class Scale:
    """A learned scale (paper, section 2.5): effective = raw * init / scale, raw starts at scale.

    Adam moves raw by about one learning rate per step, so the effective value moves by
    learning_rate * init / scale.
    """

    init: float = field(1.0, ANY, OWN, "effective value at the start")
    scale: float | None = field(
        None, POSITIVE, OWN, "raw value at the start; None: 1/sqrt(width), 0.03 with nugpt"
    )
    form: str | None = field(
        None, one_of("none", "vector", "scalar", "fixed"), OWN,
        "vector: learned, a value for each channel; scalar: learned, one value for each layer (s_z:"
        " one in all); fixed: stays at init; none: no such scale",
    )  # fmt: skip


def _scale(init: float, scale: float | None, meaning: str) -> Any:
    return section(lambda: Scale(init, scale), meaning)


SCALES = ("alpha_a", "alpha_m", "s_qk", "s_u", "s_v", "s_z")  # fields of ModelConfig
_DTYPE = one_of("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    kind: str = field(  # a name in PRESETS, which knows fields.py
        "ngpt", ANY, OWN, "preset that fills in fields that are None: ngpt, or gpt (the baseline)"
    )
    residual: str | None = field(
        None, one_of("add", "lerp", "slerp", "exp"), OWN,
        "how a block's output f moves the hidden state h. add: h + f; lerp: along the straight line"
        " to f by alpha, then Norm; slerp: along the great circle by alpha; exp: along the great"
        " circle by alpha times the tangent part of f",
    )  # fmt: skip
    alpha_depth: str | None = field(
        None, one_of("constant", "harmonic", "root"), OWN,
        "factor on the alphas of layer k, counted from 1: 1, 1/k or 1/sqrt(k)",
    )  # fmt: skip
    alpha_sign: str | None = field(
        None, one_of("absolute", "signed"), OWN, "whether a step is |alpha|, or alpha with its sign"
    )
    pre_norm: str | None = field(
        None, one_of("none", "rms"), OWN, "norm of what attention and MLP read; rms: RMSNorm"
    )
    branch_norm: str | None = field(
        None, one_of("none", "unit"), OWN, "norm of what attention and MLP return"
    )
    final_norm: str | None = field(
        None, one_of("none", "rms"), OWN, "norm of what the output table reads; rms: RMSNorm"
    )
    layers: int = field(4, POSITIVE, OWN, "transformer blocks")
    width: int = field(128, POSITIVE, OWN, "size of the residual stream (d_model, the embed axis)")
    heads: int = field(4, POSITIVE, OWN, "query heads")
    kv_heads: int | None = field(None, POSITIVE, OWN, "key and value heads; None: model.heads")
    head_dim: int | None = field(None, POSITIVE, OWN, "channels of a head, even; None: width/heads")
    mlp_width: int | None = field(None, POSITIVE, OWN, "hidden units of the SwiGLU; None: 4*width")
    context: int = field(128, POSITIVE, OWN, "tokens of a training sequence")
    vocab_size: int | None = field(None, POSITIVE, OWN, "token ids in use; None: the tokenizer's")
    vocab_multiple: int = field(
        128, POSITIVE, OWN, "tables are padded to a multiple of this; logits of padding are masked"
    )
    rope_base: float = field(10000.0, POSITIVE, OWN, "base of the rotary position embedding")
    qk_norm: bool | None = field(
        None, ANY, OWN, "normalize q and k per head", always_in_digest=True
    )
    qk_form: str | None = field(
        None, one_of("rms_before_rope", "unit_after_rope"), OWN,
        "how q and k are normalized: RMSNorm before RoPE, or to unit vectors after RoPE",
    )  # fmt: skip
    softmax_scale: str | None = field(
        None, one_of("sqrt", "rsqrt"), OWN, "factor on q k^T: sqrt(head_dim) or 1/sqrt(head_dim)"
    )
    weights: str | None = field(
        None, one_of("free", "sphere"), OWN,
        "free, or sphere: matrices consist of unit vectors along the embed axis, at the start and,"
        " with optimizer.project, after each step",
    )  # fmt: skip
    parametrization: str = field(
        "ngpt", one_of("ngpt", "nugpt", "root_width"), OWN,
        "how rates and scales follow the model's shape. ngpt: the paper's, one rate for all;"
        " nugpt: that of nuGPT, from a base shape; root_width: rates times"
        " (width/base_width)^-1/2",
    )  # fmt: skip
    base_width: int | None = field(
        None, POSITIVE, OWN, "nugpt, root_width: the width that rates and scales are given for"
    )
    base_layers: int | None = field(
        None, POSITIVE, OWN, "nugpt: the layers that alpha's init is given for; None: layers"
    )
    rms_eps: float = field(1e-6, POSITIVE, OWN, "epsilon of RMSNorm")
    init_std: float | None = field(
        None, POSITIVE, OWN, "initial standard deviation of free matrices", always_in_digest=True
    )
    normalize_on_read: bool = field(
        False, ANY, OWN, "with weights=sphere: also normalize matrices where they are read"
    )
    folded: bool = field(
        False, ANY, OWN, "scales are multiplied into the matrices; for inference, not for training"
    )
    alpha_a: Scale = _scale(0.05, None, "eigen learning rates of the attention step")
    alpha_m: Scale = _scale(0.05, None, "eigen learning rates of the MLP step")
    s_qk: Scale = _scale(1.0, None, "scale of the normalized q and k")
    s_u: Scale = _scale(1.0, 1.0, "scale of the SwiGLU's linear branch")
    s_v: Scale = _scale(1.0, 1.0, "scale of the SwiGLU's gate, times sqrt(width)")
    s_z: Scale = _scale(1.0, None, "scale of the logits, one per token id")
    dtype: str = field("float32", _DTYPE, FREE, "type of activations and matrix products")
    param_dtype: str = field("float32", _DTYPE, OWN, "type of the stored parameters")
    # It changes rounding alone, as remat does. But the digests of published tables have it.
    scan_layers: bool | None = field(
        None, ANY, FREE,
        "compile one block, and scan it over the layers; None or auto: by devices and remat",
        digest_default=True,
    )  # fmt: skip
    remat: str = field(
        "auto", one_of("auto", "none", "attention", "dots", "full"), NEUTRAL,
        "what of a block the backward pass computes again. attention: all but attention's own"
        " result; dots: all but the products with weights; full: all; auto: the least of none,"
        " attention and full that fits into the memory of the devices",
    )  # fmt: skip
    attention: str = field(
        "auto", one_of("auto", "splash", "cudnn", "xla"), NEUTRAL,
        "kernel. splash: TPU; cudnn: NVIDIA GPU; xla: any device; auto: by the devices",
    )  # fmt: skip
    kernels: str = field(
        "auto", one_of("auto", "pallas", "xla"), NEUTRAL,
        "what computes the steps between the products. pallas: fused kernels for NVIDIA GPUs; xla:"
        " any device; auto: pallas where it was tried",
    )  # fmt: skip
    loss_chunk: int | None = field(
        None, POSITIVE, NEUTRAL,
        "tokens per device whose logits exist at one time in the loss; None or auto: by memory",
    )  # fmt: skip


# A run and a study know the text and the tokenizer by fingerprints. So these fields may change.
@dataclasses.dataclass(frozen=True)
class SourceConfig:
    source: str = field(
        "stdlib", one_of(*SOURCES, "mixture"), FREE,
        "; ".join(f"{name}: {source.meaning}" for name, source in SOURCES.items())
        + "; mixture: the sources in data.mixture",
    )  # fmt: skip
    paths: tuple[str, ...] = field(
        (), ANY, NEUTRAL,
        "files, folders or globs, local or gs://; repeat the flag for more. text: .txt, .jsonl"
        " (also as .ndjson, .json), .parquet, all but the last also .gz, .zst; tfds: folder of a"
        " data set, or with tfds_name the folder of all data sets; hub: OWNER/NAME or"
        " OWNER/NAME@REVISION; prose: the folder, where it is not the usual one",
    )  # fmt: skip
    eval_paths: tuple[str, ...] = field(
        (), ANY, NEUTRAL,
        "held-out sets as name=path, of the same source; none: held_out of the documents",
    )  # fmt: skip
    text_key: str = field(
        "text", TEXT, FREE, "name of a field in .jsonl, a column in .parquet, a feature in tfds"
    )
    held_out: float = field(
        0.05, BETWEEN_0_AND_1, FREE, "share of the documents that is held out without held-out sets"
    )
    tfds_name: str | None = field(
        None, TEXT, FREE, "tfds: name of a prepared data set, e.g. lm1b or wiki40b/en"
    )
    tfds_split: str = field("train", TEXT, FREE, "tfds: split to train on")
    tfds_eval_split: str | None = field(
        None, TEXT, FREE, "tfds: held-out split; None: held_out of the documents"
    )
    hub_config: str | None = field(None, TEXT, FREE, "hub: config of a data set; None: its default")
    hub_split: str = field("train", TEXT, FREE, "hub: split to train on")
    hub_eval_split: str | None = field(
        None, TEXT, FREE, "hub: held-out split; None: held_out of the documents"
    )
    token_dtype: str | None = field(
        None, one_of("uint16", "uint32"), FREE,
        "type of the token ids. bin without a header: None is uint16, or uint32 for a tokenizer of"
        " more than 65,536 ids. array_record: None where a record is UTF-8 text, a type where it"
        " holds the token ids of a document",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    weight: float = field(
        1.0, POSITIVE, OWN, "sequences from this source, relative to the other weights"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: Mapping[str, MixtureConfig] = section(
        dict, "named sources with weights, for source=mixture: data.mixture.NAME.weight=0.3"
    )
    tokenizer: str = field(
        "byte", TEXT, FREE,
        "byte, or a path: a tokenizers JSON file, a SentencePiece .model, a .tiktoken file, or a"
        " folder with GPT-2's encoder.json and vocab.bpe; or hub:OWNER/NAME[@REVISION]: the"
        " tokenizer.json or tokenizer.model of a repository of the Hugging Face Hub",
    )  # fmt: skip
    end_of_document: str | None = field(
        None, TEXT, FREE, "token put after each document; None: </s>, <|endoftext|>, ... as found"
    )
    packing: str = field(
        "concatenate", one_of("concatenate", "best_fit"), OWN,
        "how documents fill sequences. concatenate: one after the other, cut where a sequence ends;"
        " best_fit: few documents are cut, what stays empty is padding",
    )  # fmt: skip
    mask_documents: bool = field(False, ANY, OWN, "attention sees only its own document")
    cache: str = field(
        "~/.cache/ngpt_jax/data", FOLDER, NEUTRAL, "folder of prepared tokens, for all hosts"
    )
    seed: int = field(0, SEED, OWN, "seed of the shuffle", set_by_study=True)
    workers: int = field(0, NOT_NEGATIVE, NEUTRAL, "processes that read ahead; 0: only threads")
    threads: int = field(2, POSITIVE, NEUTRAL, "that read ahead, in the program or in each worker")
    prefetch: int = field(8, POSITIVE, NEUTRAL, "batches read ahead")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int | None = field(
        None, POSITIVE, SCHEDULE, "length of the run; give steps or tokens", set_by_study=True
    )
    tokens: int | None = field(
        None, POSITIVE, SCHEDULE, "length of the run, rounded up to steps", set_by_study=True
    )
    batch_size: int = field(16, POSITIVE, SCHEDULE, "sequences per step, over all devices")
    accumulate: int = field(
        1, POSITIVE, NEUTRAL, "gradient accumulation: microbatches per step, to save memory"
    )
    seed: int = field(0, SEED, OWN, "seed of the initial parameters", set_by_study=True)
    max_skipped: int = field(10, POSITIVE, FREE, "skipped steps in a row that end the run")
    spike_deviations: float = field(
        0.0, NOT_NEGATIVE, FREE,
        "skip steps whose loss lies this many standard deviations above its running mean, besides"
        " those with a loss or gradient that is not finite; 0: only the latter",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = field(
        1, AXIS, NEUTRAL, "replicas of the model; across TPU slices. One axis can be -1: the rest"
    )
    fsdp: int = field(-1, AXIS, NEUTRAL, "parameters are sharded, and gathered where they are used")
    tensor: int = field(1, AXIS, NEUTRAL, "heads and hidden units are sharded")
    context: int = field(1, AXIS, NEUTRAL, "positions are sharded, for long sequences")


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    xla_flags: str = field(
        "overlap", one_of("overlap", "none"), NEUTRAL, "GPUs communicate while they compute, or not"
    )
    compilation_cache: str | None = field(
        "~/.cache/ngpt_jax", TEXT, NEUTRAL, "folder of compiled programs; None: none"
    )
    hang_seconds: int = field(
        1800, NOT_NEGATIVE, NEUTRAL, "a longer step prints the stacks of all threads; 0: never"
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    first_step: int = field(
        10, NOT_NEGATIVE, NEUTRAL, "steps from the start, or the resume, to the start of the trace"
    )
    num_steps: int = field(0, NOT_NEGATIVE, NEUTRAL, "steps to trace into WORKDIR/profile; 0: none")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = field(
        500, POSITIVE, NEUTRAL, "steps between evaluations; the last step is always evaluated"
    )
    batch_size: int | None = field(
        None, POSITIVE, NEUTRAL, "sequences per batch; None: train.batch_size"
    )
    batches: int | None = field(
        None, POSITIVE, NEUTRAL, "batches per evaluation; None, and at the last step: all"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(
        1000, POSITIVE, NEUTRAL, "steps between checkpoints; the last step is always saved"
    )
    minutes: float = field(
        0.0, NOT_NEGATIVE, NEUTRAL, "also save so many minutes after the last save; 0: never"
    )
    keep: int = field(2, POSITIVE, NEUTRAL, "newest checkpoints that stay on disk")
    keep_every: int | None = field(
        None, POSITIVE, NEUTRAL, "checkpoints of multiples of this step stay for good"
    )
    keep_best: int = field(
        0, NOT_NEGATIVE, NEUTRAL,
        "checkpoints of the lowest held-out loss that stay; a step that becomes one is saved",
    )  # fmt: skip
    on_error: str = field(
        "stop", one_of("stop", "continue"), NEUTRAL,
        "after a save that failed (a full disk): stop, or continue to the next save",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = field(50, POSITIVE, NEUTRAL, "steps between lines of metrics")
    wandb_project: str | None = field(
        None, TEXT, NEUTRAL, "also log to this Weights & Biases project (extra wandb)"
    )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    prompt: str = field("\n", ANY, NEUTRAL, "start of the text generated at the end of a run")
    tokens: int = field(256, NOT_NEGATIVE, NEUTRAL, "tokens of that text; 0: none")
    temperature: float = field(
        0.8, NOT_NEGATIVE, NEUTRAL, "temperature of the softmax; 0: always the likeliest token"
    )
    seed: int = field(0, SEED, NEUTRAL, "seed of that text")


@dataclasses.dataclass(frozen=True)
class Config:
    init_from: str | None = field(
        None, TEXT, FREE, "a run's folder, or one of its checkpoints, whose weights a new run takes"
    )
    model: ModelConfig = section(ModelConfig, "the network")
    optimizer: OptimizerConfig = section(OptimizerConfig, "the optimizer and its schedule")
    data: DataConfig = section(DataConfig, "text and tokens")
    train: TrainConfig = section(TrainConfig, "the run")
    mesh: MeshConfig = section(MeshConfig, "how devices share model and batch")
    runtime: RuntimeConfig = section(RuntimeConfig, "compiler and machine")
    profile: ProfileConfig = section(ProfileConfig, "a trace of some steps")
    eval: EvalConfig = section(EvalConfig, "held-out loss")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "saves")
    log: LogConfig = section(LogConfig, "metrics")
    sample: SampleConfig = section(SampleConfig, "text at the end")
