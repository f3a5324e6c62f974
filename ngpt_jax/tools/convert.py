"""Converts weights to and from Hugging Face transformers and the authors' PyTorch code.

Examples:
  python -m ngpt_jax.tools.convert --workdir=runs/ngpt --to_hf=FOLDER
  python -m ngpt_jax.tools.convert --workdir=runs/ngpt --to_hf=FOLDER --dtype=bfloat16 --folded
  python -m ngpt_jax.tools.convert --from_hf=FOLDER --out=RUN
  python -m ngpt_jax.tools.convert --workdir=runs/ngpt --to_reference=ckpt.pt
  python -m ngpt_jax.tools.convert --from_reference=ckpt.pt --out=RUN \\
      --config.data.tokenizer=llama2.json --config.model.heads=16

--to_hf writes a folder for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) and
AutoTokenizer: model.safetensors, config.json, the PyTorch code, the tokenizer. --folded multiplies
nGPT's scales into its matrices; such weights are for inference alone. Without --folded, and in
float32, --from_hf restores every parameter bit for bit, except the padding rows of the tables:
these are made anew.
--out is a folder like a run's, with the weights as checkpoint 0. ngpt_jax.load and tools.sample
open it, and a run can start from it (--config.init_from=RUN). It has no moments of an optimizer,
which tools.diagnose needs.

The authors' layout is a torch.save of a state dict, or of {"model": state dict, "model_args": ...}.
Give with --config what the file does not say: model.heads, model.context, data.tokenizer. The
position operator of the released code is not RoPE: weights trained with it do not give its logits
here. Weights trained with standard RoPE do.

--config.NAME=VALUE changes the config for this command: where the tokenizer lies (data.tokenizer).
PyTorch is needed for the authors' layout alone (pip install '.[torch]').
"""

import os
from collections.abc import Iterable

from absl import flags

from ngpt_jax.config import ConfigError, command

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run, to convert from.")
_STEP = flags.DEFINE_integer("step", None, "Its checkpoint; the newest by default.")
_TO_HF = flags.DEFINE_string("to_hf", None, "Hugging Face folder to write, new or empty.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the matrices of --to_hf; float32 by default."
)
_FOLDED = flags.DEFINE_bool("folded", False, "--to_hf: multiply nGPT's scales into the matrices.")
_TO_REFERENCE = flags.DEFINE_string("to_reference", None, "File of the authors' layout to write.")
_FROM_HF = flags.DEFINE_string("from_hf", None, "Hugging Face folder of --to_hf to read.")
_FROM_REFERENCE = flags.DEFINE_string(
    "from_reference", None, "File of the authors' layout to read."
)
_OUT = flags.DEFINE_string("out", None, "Folder like a run's to write, new or empty.")


def _direction() -> tuple[str, str, str, str]:
    """(flag to read from, its value, flag to write to, its value): exactly one of each.

    Refuses flags of another direction.
    """
    reads = {"workdir": _WORKDIR, "from_hf": _FROM_HF, "from_reference": _FROM_REFERENCE}
    writes = {"to_hf": _TO_HF, "to_reference": _TO_REFERENCE, "out": _OUT}
    read, write = (
        {name: flag.value for name, flag in some.items() if flag.value is not None}
        for some in (reads, writes)
    )
    if len(read) != 1:
        raise ConfigError(
            f"Give one of --workdir, --from_hf and --from_reference to read from{_not(read)}."
        )
    (source,) = read
    wanted = ["to_hf", "to_reference"] if source == "workdir" else ["out"]
    if len(write) != 1 or next(iter(write)) not in wanted:
        options = " or ".join(f"--{name}" for name in wanted)
        raise ConfigError(f"--{source} needs {options}{_not(write)}.")
    (target,) = write
    for name, given, needs in (
        ("step", _STEP.value is not None, "workdir"),
        ("dtype", _DTYPE.value is not None, "to_hf"),
        ("folded", _FOLDED.value, "to_hf"),
    ):
        if given and needs not in (source, target):
            raise ConfigError(f"--{name} is for --{needs}; leave it out.")
    return source, read[source], target, write[target]


def _not(given: Iterable[str]) -> str:
    names = " and ".join(f"--{name}" for name in given)
    return f", not {names}" if names else ""


def _main(overrides: list[tuple[str, str]]) -> None:
    source, path, target, out = _direction()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; nothing needs more
    from ngpt_jax.export import folders, huggingface, reference_checkpoint
    from ngpt_jax.inference import loading, opening
    from ngpt_jax.model.params import num_params
    from ngpt_jax.terminal import Terminal

    folders.check_new(target, out, remote=target == "out")
    for flag in {source, target} & {"from_reference", "to_reference"}:
        reference_checkpoint.require_torch(flag)
    notes = []
    if source == "workdir":
        with Terminal().doing("loading the model"):
            run = loading.open_model("workdir", path, _STEP.value, overrides)
        config, path = run.config, f"{path}, step {run.step}"
        if target == "to_hf":
            notes = huggingface.write_folder(run, out, _DTYPE.value or "float32", _FOLDED.value)
        else:
            notes = reference_checkpoint.write(run, out)
    else:
        read = huggingface.read_folder if source == "from_hf" else reference_checkpoint.read
        config, params, tokenizer = read(path, overrides)
        opening.write_weights(out, config, params, tokenizer.fingerprint)
    if "reference" in source + target:
        notes = [reference_checkpoint.POSITION_NOTE, *notes]
    for note in notes:
        print(f"note: {note}")
    print(f"{path} -> {out}: {config.model.kind}, {num_params(config.model):,} parameters")


if __name__ == "__main__":
    command.run_command(_main)
