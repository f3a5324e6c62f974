"""Prints a hash of every window that this process reads: batch, row and hash a line.

    python tests/stream_hashes.py BATCHES FIRST_BATCH [--flags of ngpt_jax.main]

tests/test_stream.py compares them across processes, workers and resumes.
"""

import hashlib
import importlib
import itertools
import sys

from absl import flags


def main(argv):
    import jax

    from ngpt_jax.config import ConfigError, command, experiment
    from ngpt_jax.data.corpus import load_corpus
    from ngpt_jax.data.tokenizers.load import with_tokenizer
    from ngpt_jax.parallel import distributed
    from ngpt_jax.parallel.mesh import BatchPlacer, make_mesh

    count, first, *rest = argv
    rest, overrides = command.split_overrides(rest)
    flags.FLAGS(["stream_hashes", *rest])
    given = flags.FLAGS
    distributed.initialize(given.coordinator_address, given.num_processes, given.process_id)
    config = experiment.load_config(given.config, overrides)
    config, tokenizer = with_tokenizer(config)
    data, batch_size = config.data, config.train.batch_size
    corpus = distributed.first_then_rest(
        lambda: load_corpus(data, tokenizer, config.model.context), ConfigError
    )
    rows = BatchPlacer(make_mesh(config), batch_size, config.model.context).rows
    from ngpt_jax.data import pipeline

    batches = pipeline.train_batches(
        pipeline.make_dataset(data, corpus), batch_size, int(first) * batch_size, data.threads,
        data.prefetch, rows, data.workers,
    )  # fmt: skip
    for number, batch in enumerate(itertools.islice(batches, int(count)), start=int(first)):
        for i, row in enumerate(rows):
            window = b"".join(batch[name][i].tobytes() for name in sorted(batch))
            print("window", number, row, hashlib.sha256(window).hexdigest())
    if jax.process_count() > 1:
        distributed.check_same(end="the others may still be reading")


if __name__ == "__main__":
    importlib.import_module("ngpt_jax.main")  # its flags
    main(sys.argv[1:])
