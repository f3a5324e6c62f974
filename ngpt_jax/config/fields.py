"""Every field a run has: type, default and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def _field(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


def _section(factory: Any, meaning: str) -> Any:
    return dataclasses.field(default_factory=factory, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Scale:
    """A learned scale (paper, section 2.5): effective = raw * init / scale, raw starts at scale.

    Adam moves raw by about one learning rate a step, so the effective value moves by
    learning_rate * init / scale.
    """

    init: float = _field(1.0, "effective value at the start")
    scale: float | None = _field(None, "raw value at the start; None: 1/sqrt(width)")
    form: str | None = _field(
        None, "none (there is no such scale) or vector (one value a channel); None: the kind's"
    )


def _scale(init: float, scale: float | None, meaning: str) -> Any:
    return _section(lambda: Scale(init, scale), meaning)


SCALES = ("alpha_a", "alpha_m", "s_qk", "s_u", "s_v", "s_z")  # fields of ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    kind: str = _field(
        "ngpt",
        "name of a preset, which fills in the fields whose default is None: ngpt, or gpt (the"
        " paper's baseline)",
    )
    residual: str | None = _field(
        None,
        "how a block's output moves the hidden state h: add (h + f), lerp (along the straight line"
        " to f by alpha, then Norm), slerp (along the great circle by alpha); None: the kind's",
    )
    pre_norm: str | None = _field(
        None, "of what attention and MLP read: none or rms (RMSNorm); None: the kind's"
    )
    branch_norm: str | None = _field(
        None, "of what attention and MLP return: none or unit (unit vectors); None: the kind's"
    )
    final_norm: str | None = _field(
        None, "of what the output table reads: none or rms (RMSNorm); None: the kind's"
    )
    layers: int = _field(4, "transformer blocks")
    width: int = _field(128, "size of the residual stream (d_model, the embed axis)")
    heads: int = _field(4, "query heads")
    kv_heads: int | None = _field(None, "key and value heads; None: as many as query heads")
    head_dim: int | None = _field(None, "channels of a head, even; None: width / heads")
    mlp_width: int | None = _field(None, "hidden units of the SwiGLU; None: 4 * width")
    context: int = _field(128, "tokens of a training window")
    vocab_size: int | None = _field(None, "token ids in use; None: the tokenizer's")
    vocab_multiple: int = _field(
        128, "tables are padded to a multiple of this; logits of padding are masked"
    )
    rope_base: float = _field(10000.0, "base of the rotary position embedding")
    qk_norm: bool | None = _field(None, "normalize q and k per head; None: the kind's")
    qk_form: str | None = _field(
        None,
        "of q and k: unit_after_rope (unit vectors, after RoPE) or rms_before_rope (RMSNorm, before"
        " RoPE); None: the kind's",
    )
    softmax_scale: str | None = _field(
        None, "factor on q k^T: sqrt(head_dim) or rsqrt (1/sqrt(head_dim)); None: the kind's"
    )
    weights: str | None = _field(
        None,
        "matrices: free, or sphere (unit vectors along the embed axis, at the start and, with"
        " optimizer.project, after each step); None: the kind's",
    )
    rms_eps: float = _field(1e-6, "epsilon of the baseline's RMSNorm")
    init_std: float | None = _field(
        None, "of the matrices (of no effect on a sphere); None: the kind's"
    )
    normalize_on_read: bool = _field(
        False,
        "with weights=sphere: also normalize each matrix where it is read (gradients become"
        " tangent)",
    )
    folded: bool = _field(
        False, "scales are multiplied into the matrices, as inference has them; not for training"
    )
    alpha_a: Scale = _scale(0.05, None, "eigen learning rates of the attention step")
    alpha_m: Scale = _scale(0.05, None, "eigen learning rates of the MLP step")
    s_qk: Scale = _scale(1.0, None, "scale of the normalized q and k")
    s_u: Scale = _scale(1.0, 1.0, "scale of the SwiGLU's linear branch")
    s_v: Scale = _scale(1.0, 1.0, "scale of the SwiGLU's gate, times sqrt(width)")
    s_z: Scale = _scale(1.0, None, "scale of the logits, one per token id")
    dtype: str = _field("float32", "of activations and matmuls: float32, bfloat16 or float64")
    param_dtype: str = _field("float32", "of the stored parameters")
    scan_layers: bool = _field(True, "compile one block and scan it over the layers")
    remat: str = _field(
        "none",
        "what of a block the backward pass computes again: none; attention (all but attention's"
        " own result); dots (all but the products with weights); full (everything)",
    )
    attention: str = _field(
        "auto", "kernel: auto (by the devices), splash (TPU), cudnn (NVIDIA GPU) or xla"
    )
    loss_chunk: int = _field(2048, "tokens a device whose logits exist at one time in the loss")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = _field(1e-3, "peak")
    schedule: str = _field("cosine", "cosine, wsd (warm-up, stable, linear decay) or constant")
    warmup_steps: int | None = _field(
        None,
        "None: by warmup_share; without it the kind's",
    )
    warmup_share: float | None = _field(
        None, "length of the warm-up over that of the run, in place of warmup_steps"
    )
    final_fraction: float = _field(0.0, "learning rate at the end over the peak (cosine, wsd)")
    decay_fraction: float = _field(0.2, "share of the steps that wsd decays in")
    b1: float = _field(0.9, "Adam's decay of the first moment")
    b2: float = _field(0.95, "Adam's decay of the second moment")
    eps: float = _field(1e-8, "Adam's epsilon, outside the root")
    weight_decay: float | None = _field(None, "on matrices; None: the kind's")
    clip_norm: float = _field(1.0, "global norm above which gradients are scaled down; 0: never")
    clip_eps: float = _field(0.0, "added to the norm: 0 is optax's form, 1e-6 PyTorch's")
    project: bool | None = _field(
        None,
        "put matrices back onto the sphere after each step (model.weights=sphere); None: the"
        " kind's",
    )


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    source: str = _field(
        "stdlib",
        "stdlib (the running Python's own source code), text (files), tfds (TensorFlow Datasets),"
        " array_record (text or token ids), bin (token ids of nanoGPT, llm.c or data.prepare), or"
        " mixture (data.mixture)",
    )
    paths: tuple[str, ...] = _field(
        (),
        "files, folders or globs, local or gs://; repeat the flag for more. text: .txt, .jsonl,"
        " .parquet, the first two also .gz, .zst; tfds: a data set's folder, or with tfds_name the"
        " folder of all sets",
    )
    eval_paths: tuple[str, ...] = _field(
        (), "held-out sets as name=path, of the same kind; none: held_out of the documents"
    )
    text_key: str = _field(
        "text", "field of a .jsonl line, column of a .parquet file or feature of a tfds set"
    )
    held_out: float = _field(
        0.05, "share of the documents kept for evaluation where no held-out sets are given"
    )
    tfds_name: str | None = _field(None, "tfds: of a prepared set, e.g. lm1b or wiki40b/en")
    tfds_split: str = _field("train", "tfds: split to train on")
    tfds_eval_split: str | None = _field(
        None, "tfds: held-out split; None: held_out of the documents"
    )
    token_dtype: str | None = _field(
        None,
        "bin without a header: uint16 or uint32; None: uint16. array_record: None where a record"
        " is UTF-8 text, uint16 or uint32 where it holds the token ids of a document",
    )


@dataclasses.dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    weight: float = _field(1.0, "windows taken of this source, relative to the other weights")


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: Mapping[str, MixtureConfig] = _section(
        dict, "named sources with weights, for source=mixture: data.mixture.NAME.weight=0.3"
    )
    tokenizer: str = _field(
        "byte",
        "byte, or a path: a tokenizers JSON file, a SentencePiece .model, a .tiktoken file, or a"
        " folder with GPT-2's encoder.json and vocab.bpe",
    )
    end_of_document: str | None = _field(
        None, "token put after each document; None: </s>, <|endoftext|>, ... as found"
    )
    packing: str = _field(
        "concatenate",
        "of documents into windows: concatenate (and cut), or best_fit (few documents are cut,"
        " what stays empty is padding)",
    )
    mask_documents: bool = _field(False, "attention sees nothing before its own document")
    cache: str = _field(
        "~/.cache/ngpt_jax/data", "folder of prepared tokens, shared by all hosts of a run"
    )
    seed: int = _field(0, "of the shuffle")
    workers: int = _field(0, "processes that read ahead; 0: threads of the program itself")
    threads: int = _field(2, "that read ahead, in the program or in each worker")
    prefetch: int = _field(8, "batches read ahead")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int | None = _field(None, "length of the run in steps (give steps or tokens)")
    tokens: int | None = _field(None, "length of the run in tokens, rounded up to whole steps")
    batch_size: int = _field(16, "windows a step, over all devices")
    accumulate: int = _field(1, "microbatches that a step's batch is cut into, to save memory")
    seed: int = _field(0, "of the parameters' init")
    max_skipped: int = _field(
        10, "steps in a row with a loss or gradient that is not finite, or a spike, that end a run"
    )
    spike_deviations: float = _field(
        0.0,
        "a step whose loss lies this many standard deviations above its running mean is skipped;"
        " 0: never",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = _field(1, "replicas of the model; across TPU slices. -1 in one axis: the rest")
    fsdp: int = _field(-1, "parameters are cut, and gathered where they are used")
    tensor: int = _field(1, "heads and hidden units are cut")
    context: int = _field(1, "positions are cut, for long contexts")


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    xla_flags: str = _field(
        "overlap",
        "overlap: let communication and computation overlap on GPUs (TPUs do anyway); none",
    )
    compilation_cache: str | None = _field(
        "~/.cache/ngpt_jax", "folder of compiled programs, used on TPU and GPU; None: no cache"
    )
    hang_seconds: int = _field(
        1800, "a step that takes longer dumps the stacks of all threads to stderr; 0: never"
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    first_step: int = _field(10, "step of a run, or of its continuation, at which to start")
    num_steps: int = _field(0, "steps to trace into WORKDIR/profile; 0: none")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = _field(500, "steps between evaluations; the last one is always made")
    batch_size: int | None = _field(None, "windows a batch; None: the training batch")
    batches: int | None = _field(
        None, "batches of an evaluation on the way; None: all. The last one reads all"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = _field(1000, "steps between checkpoints; the last step is always saved")
    minutes: float = _field(
        0.0, "minutes after which a checkpoint is saved besides, by process 0's clock; 0: never"
    )
    keep: int = _field(2, "newest checkpoints that stay on disk")
    keep_every: int | None = _field(None, "checkpoints of multiples of this step stay for good")
    keep_best: int = _field(
        0,
        "checkpoints of the lowest held-out loss that stay; an evaluation that makes the list"
        " is saved",
    )
    on_error: str = _field(
        "stop", "after a save that failed (a full disk): stop, or continue to the next save"
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = _field(50, "steps between lines of metrics")
    wandb_project: str | None = _field(
        None, "also log to this Weights & Biases project (extra wandb)"
    )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    prompt: str = _field("\n", "text to go on from at the end of a run")
    tokens: int = _field(256, "tokens to generate at the end of a run; 0: none")
    temperature: float = _field(0.8, "of the softmax; 0: always the likeliest token")
    seed: int = _field(0, "of the sample")


@dataclasses.dataclass(frozen=True)
class Config:
    init_from: str | None = _field(
        None, "a run's folder, or one of its checkpoints, whose weights a new run starts from"
    )
    model: ModelConfig = _section(ModelConfig, "the network")
    optimizer: OptimizerConfig = _section(OptimizerConfig, "Adam and its schedule")
    data: DataConfig = _section(DataConfig, "text and tokens")
    train: TrainConfig = _section(TrainConfig, "the run")
    mesh: MeshConfig = _section(MeshConfig, "how devices share model and batch")
    runtime: RuntimeConfig = _section(RuntimeConfig, "compiler and machine")
    profile: ProfileConfig = _section(ProfileConfig, "a trace of some steps")
    eval: EvalConfig = _section(EvalConfig, "held-out loss")
    checkpoint: CheckpointConfig = _section(CheckpointConfig, "saves")
    log: LogConfig = _section(LogConfig, "metrics")
    sample: SampleConfig = _section(SampleConfig, "text at the end")
