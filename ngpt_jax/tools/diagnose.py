"""The paper's figures from a run's checkpoint: matrices, scales, angles, attention, steps.

Examples:
  python -m ngpt_jax.tools.diagnose --workdir=runs/quickstart
  python -m ngpt_jax.tools.diagnose --workdir=runs/ngpt --against=runs/gpt --out=figures
  python -m ngpt_jax.tools.diagnose --workdir=runs/ngpt --step=2000 --layers=3,4 \\
      --config.data.paths=/data/owt_llama2

Each figure is a PNG, with its numbers in a CSV file of the same name; a second run is laid over the
first one. What is measured on parameters alone needs only the checkpoint of a run,
which has the optimizer's state (converted weights have none). Angles and the entropy of
attention are measured on the run's held-out text. Rotation and gradients are measured on its next
training batch, with the optimizer's moments. Where the text is not here, these are left out, and a
line gives the reason.
--config.NAME=VALUE changes the config of the runs for this command: where text and tokenizer lie
(data.paths, data.cache), train.accumulate where a batch does not fit. One device is used.

Layers are counted from 0. Rotation is given at two learning rates: the one that the schedule has
for the next step (0 at the end of a cosine), and the peak, optimizer.learning_rate.
"""

from absl import flags

from ngpt_jax.config import ConfigError, command

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.")
_AGAINST = flags.DEFINE_string("against", None, "The folder of a run to lay over it.")
_STEP = flags.DEFINE_integer(
    "step", None, "The checkpoint, of both runs; the newest of each by default."
)
_OUT = flags.DEFINE_string("out", None, "Folder for the figures; WORKDIR/diagnose by default.")
_LAYERS = flags.DEFINE_list(
    "layers", None, "Layers, from 0, whose queries and keys are shown; the middle two by default."
)
_WINDOWS = flags.DEFINE_integer(
    "windows", 16, "Held-out sequences for angles and attention.", lower_bound=1
)


def _main(overrides: list[tuple[str, str]]) -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is needed: the folder of a training run.")
    from ngpt_jax.diagnose import report

    folders = {"workdir": _WORKDIR.value} | ({"against": _AGAINST.value} if _AGAINST.value else {})
    print(report.diagnose(
        folders, _STEP.value, overrides, _LAYERS.value, _WINDOWS.value, _OUT.value
    ))  # fmt: skip


if __name__ == "__main__":
    command.run_command(_main)
