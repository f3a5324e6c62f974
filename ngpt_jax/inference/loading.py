"""A trained model, loaded for use: it generates text, and gives log-probabilities of a text."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ngpt_jax.checkpoint.folder import find_checkpoint
from ngpt_jax.checkpoint.restoring import restore
from ngpt_jax.config import Config, ConfigError
from ngpt_jax.config.facts import check_seed
from ngpt_jax.data.tokenizers.base import Tokenizer, check_tokenizer
from ngpt_jax.data.tokenizers.load import with_tokenizer
from ngpt_jax.decoding import folding, generation
from ngpt_jax.decoding.sampling import Sampling
from ngpt_jax.inference import arguments, opening, scoring
from ngpt_jax.inference.arguments import Ids, Prompt
from ngpt_jax.inference.text import Streamed, TextStream
from ngpt_jax.parallel.backend import enable_x64_if_used
from ngpt_jax.parallel.mesh import device_mesh
from ngpt_jax.training import layout

_BUCKET = 64  # scored rows are padded to multiples of this: few programs for many lengths


class LoadedModel:
    """A model's weights, config and tokenizer, from :func:`load`.

    Attributes:
      params: the parameters of the checkpoint: as trained, or folded where it holds folded ones.
      config: resolved, with the vocabulary filled in.
      tokenizer: the one of the training.
      mesh: of the devices that hold the parameters.
      step: of the checkpoint.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, params: Any, mesh: Mesh, step: int):
        self.config, self.tokenizer, self.params = config, tokenizer, params
        self.mesh, self.step = mesh, step

    @functools.cached_property
    def _weights(self) -> Any:
        """Folded weights, made for the first text to generate; scoring reads ``params``."""
        model, mesh = self.config.model, self.mesh
        with jax.set_mesh(mesh):
            return jax.jit(lambda p: folding.for_inference(model, p))(self.params)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        tokens: int = 256,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        context: int | None = None,
    ) -> Any:
        """Continues prompts.

        Args:
          prompts: a text, or token ids, or a list of such. A text is read as the start of a
            document. Token ids are taken as they are: for the start of a document, put
            ``tokenizer.eod`` first, as training does.
          tokens: to generate for each prompt, at most.
          temperature: 0 takes the likeliest token.
          top_k, top_p, min_p: filters, see :class:`ngpt_jax.decoding.sampling.Sampling`.
          seed: below 2^32; what row i of a batch draws depends on it, on the prompt and on i alone.
          stop: a text at which to stop, or several; None: no such text.
          context: tokens of prompt and text together, at most; None: the training context.

        Returns:
          A :class:`ngpt_jax.inference.text.Generation` for one prompt, a list of them for a list.

        Raises ConfigError for a prompt that is empty or too long, for values out of range, and for
        weights that give no finite numbers.
        """
        many, one = arguments.as_list("prompts", prompts)
        how = arguments.sampling(temperature, top_k, top_p, min_p)
        stops = arguments.stop_strings(stop)
        streams = [TextStream(self.tokenizer, self._ids("prompts", p), stops) for p in many]
        for _ in self._run(streams, tokens, how, seed, context):
            pass
        out = [stream.result() for stream in streams]
        return out[0] if one else out

    def stream(
        self,
        prompt: Prompt,
        tokens: int = 256,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        context: int | None = None,
    ) -> Streamed:
        """Like :meth:`generate`, for one prompt: an iterator over the pieces of text as they come.

        A piece comes when later tokens can no longer change it: its characters are whole, and no
        stop string begins in it. After the last piece, ``result`` is the whole
        :class:`Generation`.
        """
        how = arguments.sampling(temperature, top_k, top_p, min_p)
        text = TextStream(self.tokenizer, self._ids("prompt", prompt), arguments.stop_strings(stop))
        return Streamed(text, self._run([text], tokens, how, seed, context, chunk=4))

    def _ids(self, name: str, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return [self.tokenizer.eod, *self.tokenizer.encode(prompt)]
        ids = arguments.token_ids(name, prompt, self._vocab_size)
        if not ids:
            raise ConfigError(f"{name}: A prompt has no tokens; begin with tokenizer.eod.")
        return ids

    @property
    def _vocab_size(self) -> int:
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    def _run(
        self, streams: list[TextStream], tokens: int, how: Sampling, seed: int,
        context: int | None, chunk: int = generation.CHUNK
    ) -> Iterator[None]:  # fmt: skip
        """Checks the rest, and returns an iterator that draws tokens, a chunk at a time.

        It adds them to the streams, until all have ended.
        """
        tokens = arguments.integer("tokens", tokens, 1)
        seed = check_seed("seed", seed)
        limit = self.config.model.context
        if context is not None:
            limit = arguments.integer("context", context)
        if not streams:
            return iter(())
        longest = max(len(stream.prompt) for stream in streams)
        if longest >= limit:
            raise ConfigError(
                f"A prompt has {longest} tokens, and the context {limit}: no room for more. Cut it,"
                " or give a larger --context (context= in Python); the model was trained on"
                f" {self.config.model.context} tokens."
            )
        count = max(stream.limit(tokens, limit) for stream in streams)
        if longest + count >= 2**31:
            raise ConfigError(
                "A text of 2^31 tokens does not fit; give less --tokens or --context."
            )
        return self._draw(streams, count, how, seed, chunk)

    def _draw(
        self, streams: list[TextStream], count: int, how: Sampling, seed: int, chunk: int
    ) -> Iterator[None]:
        prompts, eod = [s.prompt for s in streams], self.tokenizer.eod
        chunks = generation.generate(
            self.config.model, self._weights, prompts, count, how, seed, eod, chunk
        )
        while not all(stream.stop_reason for stream in streams):
            with jax.set_mesh(self.mesh):  # left before the yield: the caller has its own
                ids, log_probs = next(chunks)
            check_finite(float(log_probs.sum()))
            for stream, row, probs in zip(streams, ids.tolist(), log_probs.tolist()):
                stream.add(row, probs)
            yield

    def logprobs(self, texts: Prompt | Sequence[Prompt]) -> Any:
        """Log-probabilities of the tokens of texts.

        Args:
          texts: a text, or token ids, or a list of such. A text is read as a document: the
            end-of-document token is put before it. Token ids are taken as they are.

        Returns:
          A float32 array for one text, a list of them for a list: the log-probability in nats of
          each token given those before it; for token ids, of all but the first.

        Raises ConfigError for a text longer than the training context, and for weights that are
        not finite.
        """
        many, one = arguments.as_list("texts", texts)
        rows = [self._ids("texts", text) for text in many]
        limit = self.config.model.context + 1
        if (longest := max(map(len, rows), default=0)) > limit:
            raise ConfigError(
                f"A text has {longest - 1} tokens, more than the context of"
                f" {self.config.model.context}; cut it into pieces."
            )
        out = [log_probs for log_probs, _ in self.score(rows)]
        for log_probs in out:
            check_finite(float(log_probs.sum()))
        return out[0] if one else out

    def score(
        self,
        rows: Sequence[Ids],
        batch_size: int = 16,
        progress: Callable[[float], None] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probability of each token of a row but the first, and whether it was the likeliest.

        Args:
          rows: of token ids, of any length; rows of similar length are batched together.
          batch_size: rows of the training context at one time; more of shorter rows, so that a
            batch has as many tokens.
          progress: called after each batch with the share of the tokens that is done.

        Returns:
          For each row, in the order given, a float32 and a bool array of its length less one;
          both are empty for an empty row.

        Raises ConfigError for ids that the model does not know.
        """
        batch_size = arguments.integer("batch_size", batch_size, 1)
        rows = arguments.id_rows("rows", rows, self._vocab_size)
        empty = np.zeros(0, np.float32), np.zeros(0, bool)
        found = {i: empty for i, row in enumerate(rows) if not row}
        order = sorted(set(range(len(rows))) - set(found), key=lambda i: -len(rows[i]))
        left = total = sum(len(rows[i]) for i in order)
        start, context = 0, _padded(self.config.model.context)
        with jax.set_mesh(self.mesh):
            while start < len(order):
                length = _padded(len(rows[order[start]]) - 1)
                size = batch_size * max(context // length, 1)
                some = order[start : start + size]
                # Only the last batch can have fewer rows: it is padded to a power of two.
                size = min(size, 1 << (len(some) - 1).bit_length())
                tokens = np.zeros((size, length + 1), np.int32)
                for row, i in zip(tokens, some):
                    row[: len(rows[i])] = rows[i]
                log_probs, likeliest = scoring.score(self.config.model, self.params, tokens)
                log_probs, likeliest = np.asarray(log_probs), np.asarray(likeliest)
                for place, i in enumerate(some):  # copies, as a view would keep the whole batch
                    end = len(rows[i]) - 1
                    found[i] = log_probs[place, :end].copy(), likeliest[place, :end].copy()
                    left -= len(rows[i])
                start += len(some)
                if progress is not None:
                    progress(1 - left / total)
        return [found[i] for i in range(len(rows))]


def check_finite(log_prob: float) -> None:
    """Raises ConfigError for a log-probability that is infinite or not a number."""
    if not math.isfinite(log_prob):
        raise ConfigError(
            f"The model gives a log-probability of {log_prob}: its weights are not finite, or"
            " too large for model.dtype; try another --step, or --config.model.dtype=float32."
        )


def _padded(length: int) -> int:
    return max(-(-length // _BUCKET), 1) * _BUCKET


def load(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads a trained model from a run's folder.

    Args:
      workdir: the folder of a run, or one that ``tools.convert`` made.
      step: of the checkpoint; None: the newest.
      overrides: config fields by dotted name: where the tokenizer lies here (data.tokenizer),
        model.dtype, or mesh.tensor and the others to use more than one device.

    Raises ConfigError.

    Examples:
      >>> model = ngpt_jax.load("runs/quickstart")  # doctest: +SKIP
      >>> model.generate("def main(", tokens=50, temperature=0).text  # doctest: +SKIP
    """
    if not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
        raise ConfigError(f"workdir must be the folder of a run, got {workdir!r:.60}.")
    if step is not None:
        step = arguments.integer("step", step)
    return open_model("workdir", os.fspath(workdir), step, arguments.overrides(overrides))


def open_model(
    flag: str, path: str, step: int | None, overrides: Sequence[tuple[str, str]]
) -> LoadedModel:
    """As :func:`load`, for a command.

    Args:
      flag: that named the folder.
      path: the folder.
      step: of the checkpoint; None: the newest.
      overrides: (dotted name, text). One device is used where none of mesh.* is among them.

    Raises ConfigError.
    """
    config = opening.read_config(flag, path, overrides)
    checkpoint = find_checkpoint(flag, path, step)
    config, tokenizer = with_tokenizer(config)
    enable_x64_if_used(config.model)
    several = any(name.startswith("mesh.") for name, _ in overrides)
    mesh = device_mesh(config.mesh, None if several else jax.devices()[:1])
    like = {"params": layout.abstract_params(config.model, mesh)}
    where = f"{checkpoint} is not of the model in {path}/config.json"
    mend = "put the config.json of its run there"
    state, progress = restore(checkpoint, like, where, mend, only="params/")
    check_tokenizer(tokenizer, progress["tokenizer"], f"--{flag}={path}")
    return LoadedModel(config, tokenizer, state["params"], mesh, int(checkpoint.name))
