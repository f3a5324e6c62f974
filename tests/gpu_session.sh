#!/usr/bin/env bash
# Fifteen minutes with one NVIDIA GPU: are the kernels right, and how fast is training?
#
# Installed must be:  pip install '.[cuda,test]'   in the repository's root. No network is needed.
#
#   tests/gpu_session.sh --out=gpu_session.jsonl                all, in 14 minutes
#   tests/gpu_session.sh --out=gpu_session.jsonl --budget=540   what fits into 9 minutes
#   tests/gpu_session.sh --out=dry.jsonl --dry                  tiny and interpreted, on a CPU
#
# Every result is one line of --out, written at once. A second call with the same --out goes on
# where the first one stopped. At the end: a table, and the line for VERIFIED in
# ngpt_jax/model/fused.py if every kernel agreed. `python tests/gpu_session.py --help` tells more.
set -u
cd "$(dirname "$0")/.." || exit 2

budget=840
arguments=()
for argument in "$@"; do
  case $argument in
    --help | -h) exec python tests/gpu_session.py --help ;;
    --budget=*) budget=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
  # Tiny models: compiling is what takes time.
  [ "$argument" = --dry ] && export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0
done
deadline=$(($(date +%s) + budget))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
# Two models of 1B are in memory at one time. Programs are kept for a second call.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/ngpt_jax_gpu_session}

session() {
  local left=$((deadline - $(date +%s)))
  timeout $((left > 0 ? left + 20 : 20)) \
    python tests/gpu_session.py --deadline="$deadline" "${arguments[@]}" "$@"
}

parts=$(session --list) || exit 2
for part in $parts; do
  # A process of its own for each part. If it ends or hangs, a new one goes on with the next check:
  # a fault on a GPU leaves a process useless.
  for _ in 1 2 3 4 5 6 7 8; do
    session --part="$part"
    status=$?
    [ $status -eq 2 ] && exit 2
    [ $status -eq 0 ] && break
  done
done
session --table
