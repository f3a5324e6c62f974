"""Lists runs: kind, size, step, held-out loss and state.

Examples:
  python -m ngpt_jax.tools.runs
  python -m ngpt_jax.tools.runs experiments/speedup/runs
"""

from ngpt_jax.config import command


def _main(overrides: list[tuple[str, str]], folder: str = "runs") -> None:
    command.refuse_overrides(overrides)
    from ngpt_jax.terminal import format_table
    from ngpt_jax.training.history import list_runs

    names = "folder", "kind", "parameters", "step", "held-out loss", "state"
    rows = list(list_runs(folder))
    print(format_table([names, *rows]) if rows else f"there are no runs in {folder}")


if __name__ == "__main__":
    command.run_command(_main, arguments=1)
