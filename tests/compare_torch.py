"""Training steps on a CPU, against the authors' architectures in compiled PyTorch.

Example, with torch installed (pip install '.[torch]') and nothing else running:
  PYTHONPATH=$PWD python tests/compare_torch.py --json=compare_torch.json

For nGPT and for GPT two processes train the model of ngpt_jax.tools.benchmark (4 layers, width 256,
8192 ids, 8 sequences of 256 tokens, float32) from the same weights, on the same batch, with the
same optimizer, learning rates and threads. One is ours, the other a model in PyTorch with compiled
passes and projection and PyTorch's fused AdamW. They run in turn, some steps at a time; one waits
while the other works. The ratio is that of tokens per second, ours over theirs, as the median over
the pairs. The losses of both are printed too: they are equal but for rounding.

The PyTorch code here was written from the paper's equations and has the parameters of the authors'
code: one matrix for up and gate, h normalized before each step (of which the value needs none),
and sqrt(d) on both halves of the MLP. RoPE turns pairs of neighbours, as the paper's does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("ngpt", "gpt")
QUIET = 0.05  # of all cores: what other programs may take during a timing that counts
Arrays = Mapping[str, np.ndarray]

# ---------------------------------------------------------------------------- theirs


def make_loss(kind: str, layers: int, heads: int) -> Callable[..., Any]:
    """(parameters by the authors' names, inputs, targets) -> mean cross-entropy, in PyTorch."""
    import torch
    import torch.nn.functional as F

    def unit(x):  # Norm
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def rms(x, gain):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain

    def turn(x, cos, sin):  # (B, T, heads, head_dim)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def attention(w, x, cos, sin):
        batch, length, width = x.shape
        split = batch, length, heads, width // heads
        q, k, v = (F.linear(x, w[f"{name}.weight"]).view(split) for name in _QKV)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        factor = split[-1] ** -0.5
        if kind == "ngpt":  # equations 15 and 16; the scale is stored over sqrt(d)
            s_qk = w["sqk"].view(heads, -1) * width**0.5
            q, k, factor = unit(q) * s_qk, unit(k) * s_qk, split[-1] ** 0.5
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor)
        return F.linear(out.transpose(1, 2).reshape(x.shape), w["att_c_proj.weight"])

    def mlp(w, x):
        up_gate = F.linear(x, w["c_fc.weight"])
        if kind == "ngpt":  # equations 20 and 21
            up_gate = up_gate * (w["suv"] * x.shape[-1] ** 0.5)
        u, v = up_gate.chunk(2, -1)
        return F.linear(u * F.silu(v), w["mlp_c_proj.weight"])

    def step(h, branch, alpha):  # equations 10 and 11; alpha starts at 0.05
        alpha, h = torch.abs(alpha * (0.05 * h.shape[-1] ** 0.5)), unit(h)
        return unit(h + alpha * (unit(branch) - h))

    def loss(params, inputs, targets):
        h = F.embedding(inputs, params["transformer.wte.weight"])
        length, head_dim = h.shape[1], h.shape[2] // heads
        rates = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = (torch.arange(length)[:, None] * rates)[:, None]
        cos, sin = angles.cos(), angles.sin()
        for i in range(layers):
            prefix = f"transformer.h.{i}."
            w = {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}
            if kind == "ngpt":
                h = step(h, attention(w, h, cos, sin), w["attn_alpha"])
                h = step(h, mlp(w, h), w["mlp_alpha"])
            else:
                h = h + attention(w, rms(h, w["rmsnorm_att.weight"]), cos, sin)
                h = h + mlp(w, rms(h, w["rmsnorm_mlp.weight"]))
        if kind == "gpt":
            h = rms(h, params["rmsnorm_f.weight"])
        logits = F.linear(h, params["lm_head.weight"])
        if kind == "ngpt":
            logits = logits * (params["sz"] * h.shape[-1] ** 0.5)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


_QKV = ("query", "key", "value")


def _unit_dim(name: str) -> int:
    """The axis of a matrix (out, in) along which its vectors lie in the residual space."""
    return 0 if name.endswith("_proj.weight") else 1


def torch_trainer(kind: str, start: Arrays, layers: int, heads: int) -> Callable[[], float]:
    """A function that makes one training step and returns the loss before it.

    ``start`` has the parameters, and ``inputs``, ``targets`` and ``rates``, the learning rate of
    each step.
    """
    import torch

    own = {name: torch.tensor(x) for name, x in start.items()}
    inputs, targets = (own.pop(name).long() for name in ("inputs", "targets"))
    rates = iter(own.pop("rates").tolist())
    params = {name: w.requires_grad_() for name, w in own.items()}
    matrices = [w for w in params.values() if w.ndim > 1]
    vectors = [w for w in params.values() if w.ndim < 2]
    decay = 0.1 if kind == "gpt" else 0.0
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    loss_fn = torch.compile(make_loss(kind, layers, heads))

    @torch.compile
    def project():
        with torch.no_grad():
            for name, w in params.items():
                if w.ndim > 1:
                    w.div_(torch.linalg.vector_norm(w, dim=_unit_dim(name), keepdim=True))

    def train_step() -> float:
        rate = next(rates)
        for group in adam.param_groups:
            group["lr"] = rate
        loss = loss_fn(params, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if kind == "ngpt":
            project()
        return loss.item()

    return train_step


# ---------------------------------------------------------------------------- ours


def our_config(kind: str) -> Any:
    from ngpt_jax.benchmark import configs, train_step
    from ngpt_jax.config.presets import of_kind
    from ngpt_jax.config.resolve import resolve

    return resolve(of_kind(configs.load(None, [], train_step.SMALL), kind))


def our_start(config: Any, steps: int) -> dict[str, np.ndarray]:
    """Weights under the authors' names, a batch, and the learning rate of each step."""
    import jax

    from ngpt_jax.export.reference_layout import to_reference
    from ngpt_jax.optim.schedules import make_schedule
    from ngpt_jax.training.step import init_params

    c = config.model
    shape = (config.train.batch_size, c.context + 1)
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, shape, np.int32)
    params = init_params(c, jax.random.key(config.train.seed))
    rates = make_schedule(config.optimizer, config.train.steps)(np.arange(steps))
    return {
        **to_reference(params, c), "inputs": tokens[:, :-1], "targets": tokens[:, 1:],
        "rates": np.asarray(rates, np.float64),
    }  # fmt: skip


def our_trainer(kind: str, start: Arrays) -> Callable[[], float]:
    """The step of training and of tools.benchmark, from the weights that theirs has."""
    from ngpt_jax.benchmark import train_step

    tokens = np.concatenate([start["inputs"], start["targets"][:, -1:]], 1)
    run = train_step.make_stepper(kind, our_config(kind), tokens)
    state = run.state

    def step() -> float:
        nonlocal state
        state, metrics = run.step(state, run.batch)
        return float(metrics["loss"])

    return step


# ---------------------------------------------------------------------------- in turn


class Worker:
    """A process that makes steps when it is told, and sleeps in between."""

    def __init__(self, library: str, kind: str, start: Path, threads: int):
        command = [sys.executable, __file__, f"--worker={library}", f"--kind={kind}"]
        command += [f"--start={start}", f"--threads={threads}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, steps: int) -> tuple[float, float, list[float]]:
        """Seconds of that many steps, the share of all cores that others took, and the losses."""
        assert self._process.stdin and self._process.stdout
        busy = _busy_seconds()
        print(steps, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a worker ended; its message is above.")
        seconds, own, losses = json.loads(line)
        others = (_busy_seconds() - busy - own) / (seconds * (os.cpu_count() or 1))
        return seconds, others, losses

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _busy_seconds() -> float:
    """CPU seconds of all programs and all cores since the machine started (Linux)."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def work(library: str, kind: str, path: Path, threads: int) -> None:
    """Reads numbers of steps, and writes seconds, CPU seconds and losses."""
    start = dict(np.load(path))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    if library == "torch":
        import torch

        torch.set_num_threads(threads)
        config = our_config(kind).model
        step = torch_trainer(kind, start, config.layers, config.heads)
    else:
        step = our_trainer(kind, start)
    for line in sys.stdin:
        begun = np.array([time.perf_counter(), time.process_time()])
        losses = [step() for _ in range(int(line))]
        spent = np.array([time.perf_counter(), time.process_time()]) - begun
        print(json.dumps([*spent, losses]), file=answers, flush=True)


def measure(kind: str, pairs: int, steps: int, threads: int) -> dict[str, Any]:
    """Times some steps of ours and of theirs in turn; who is first alternates.

    Pairs that other programs disturbed are made again, three times as many in all at most.
    """
    config = our_config(kind)
    warmup, most = 3, 3 * pairs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "start.npz")
        np.savez(path, **our_start(config, warmup + most * steps))
        workers = {name: Worker(name, kind, path, threads) for name in ("jax", "torch")}
        first = {name: worker.run(warmup)[2] for name, worker in workers.items()}
        made: list[dict[str, float]] = []  # seconds of each, and the larger share of others
        while len(made) < most and sum(p["others"] < QUIET for p in made) < pairs:
            both = {
                name: workers[name].run(steps) for name in sorted(workers, reverse=len(made) % 2)
            }
            made.append({name: spent for name, (spent, _, _) in both.items()})
            made[-1]["others"] = max(others for _, others, _ in both.values())
        for worker in workers.values():
            worker.close()
    tokens = steps * config.train.batch_size * config.model.context
    quiet = [p for p in made if p["others"] < QUIET]
    counted = quiet if len(quiet) == pairs else made
    ratios = [p["torch"] / p["jax"] for p in counted]
    medians = {name: statistics.median(p[name] for p in counted) for name in workers}
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()},
        "quiet_pairs": len(quiet),
        "pairs": made,
        "first_losses": first,
        "last_loss": {name: losses[-1] for name, (_, _, losses) in both.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--pairs", type=int, default=5, help="of timings, for each model")
    parser.add_argument("--steps", type=int, default=10, help="of one timing")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of both; all cores by default")
    parser.add_argument("--kind", choices=KINDS, help="this model alone")
    for name in ("worker", "start"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # XLA has as many threads as cores that it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.worker:
        return work(args.worker, args.kind, args.start, args.threads)
    import jax
    import torch

    numbers: dict[str, Any] = {
        "jax": jax.__version__, "torch": torch.__version__, "threads": args.threads,
        "steps": args.steps,
    }  # fmt: skip
    for kind in (args.kind,) if args.kind else KINDS:
        numbers[kind] = of_kind = measure(kind, args.pairs, args.steps, args.threads)
        rates, quiet = of_kind["tokens_per_second"], of_kind["quiet_pairs"]
        if quiet < args.pairs:
            print(f"{kind}: other programs disturbed the timings: only {quiet} pairs were quiet")
        print(
            f"{kind}: {of_kind['ratio']:.3f} of their tokens/s ({rates['jax']:,.0f} and"
            f" {rates['torch']:,.0f}; ratios {min(of_kind['ratios']):.3f} to"
            f" {max(of_kind['ratios']):.3f}); losses {of_kind['last_loss']['jax']:.5f} and"
            f" {of_kind['last_loss']['torch']:.5f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
