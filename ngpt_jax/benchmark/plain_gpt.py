"""A GPT in plain jax and optax, as short as it gets: the yardstick of the benchmark."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def init(key, layers, width, heads, vocab):
    def normal(shape, std=0.02):
        nonlocal key
        key, sub = jax.random.split(key)
        return std * jax.random.normal(sub, shape)

    head_dim, out_std = width // heads, 0.02 * (2 * layers) ** -0.5

    def block():
        return {
            "norm1": jnp.ones(width),
            "q": normal((width, heads, head_dim)),
            "k": normal((width, heads, head_dim)),
            "v": normal((width, heads, head_dim)),
            "o": normal((heads, head_dim, width), out_std),
            "norm2": jnp.ones(width),
            "up": normal((width, 4 * width)),
            "gate": normal((width, 4 * width)),
            "down": normal((4 * width, width), out_std),
        }

    blocks = [block() for _ in range(layers)]
    tables = {"embed": normal((vocab, width)), "unembed": normal((vocab, width))}
    return {"blocks": blocks, "norm": jnp.ones(width), **tables}


def rms_norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * gain


def rope(x):
    length, _, head_dim = x.shape[1:]
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim))
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, None, :] for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["blocks"]:
        h = rms_norm(x, p["norm1"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", rope(q), rope(k)) / q.shape[-1] ** 0.5
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        probs = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        x = x + jnp.einsum("bhts,bshk,hkd->btd", probs, v, p["o"])
        h = rms_norm(x, p["norm2"])
        x = x + ((h @ p["up"]) * jax.nn.silu(h @ p["gate"])) @ p["down"]
    return rms_norm(x, params["norm"]) @ params["unembed"].T


def make_train_step(schedule):
    """(init, step): AdamW 0.1 on matrices, global clip 1."""
    decay = lambda params: jax.tree.map(lambda w: w.ndim > 1, params)  # noqa: E731
    adamw = optax.adamw(schedule, 0.9, 0.95, weight_decay=0.1, mask=decay)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def loss_fn(params, batch):
        logits = forward(params, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    return tx.init, step
