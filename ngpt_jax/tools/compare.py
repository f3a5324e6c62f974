"""Compares models fairly: each run has its own full schedule, each model its own tuned rate.

Examples:
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --dry_run
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --report_only
  python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py \\
      --check=stdlib128-ngpt-500-0.014-seed0

The experiment file defines get_config(variants), as for training, and get_study(), which says what
to compare: models, settings, budgets, the field to tune, seeds (see ngpt_jax/study/plan.py). The
same command resumes it, and skips what is done. Several such commands with the
same --out, on one machine or on several that share it, divide the work among them.
"""

from absl import flags

from ngpt_jax.config import ConfigError, command
from ngpt_jax.errors import tell
from ngpt_jax.files import reason

_EXPERIMENT = flags.DEFINE_string(
    "experiment", None, "File with get_config() and get_study()[:variant,...]."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the results; the file's name without .py.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Look for their text, list the runs that are due, and stop."
)
_REPORT_ONLY = flags.DEFINE_bool(
    "report_only", False, "Write the report of the runs that have finished, and stop."
)
_CHECK = flags.DEFINE_string(
    "check", None, "Run this point of the table once more, apart, and compare its loss."
)


def _main(overrides: list[tuple[str, str]]) -> int:
    command.refuse_overrides(overrides)
    if _EXPERIMENT.value is None:
        raise ConfigError("Give --experiment=experiments/speedup.py (see --help).")
    if sum(map(bool, (_CHECK.value, _DRY_RUN.value, _REPORT_ONLY.value))) > 1:
        raise ConfigError("Give only one of --check, --dry_run and --report_only.")
    from ngpt_jax.study import compare, runner

    try:
        return compare.compare(
            _EXPERIMENT.value, _OUT.value, _DRY_RUN.value, _REPORT_ONLY.value, _CHECK.value
        )
    except runner.PointFailed as e:
        tell(f"error: {e}")
        return 1
    except BrokenPipeError:  # `| head`
        raise
    except OSError as e:  # a full disk, a folder that cannot be written, no locks
        where = e.filename or _OUT.value or f"the results of {_EXPERIMENT.value}"
        raise ConfigError(f"{where}: {reason(e)}.") from e


if __name__ == "__main__":
    command.run_command(_main)
