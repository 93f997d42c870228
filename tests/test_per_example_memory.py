"""Temporary memory on 784-128-128-10, 64 examples, float32, as compiled; nothing runs.

A net so small that X itself, 196 KiB, is larger than what its gradient needs. What reductions need on
784-512-512-10 is in `test_reductions.py`, how the diagonal compares with the Jacobians' own size in
`test_curvature.py`; `experiments/benchmarks/per_example.py` has the table with times.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import fnn

COST = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels)


def temporary(f) -> int:
    params = jax.eval_shape(partial(fnn.init, sizes=(784, 128, 128, 10), dtype="float32"), jax.random.key(0))
    X, y = jax.ShapeDtypeStruct((64, 784), np.float32), jax.ShapeDtypeStruct((64,), np.int32)
    analysis = jax.jit(f).lower(params, X, y).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def of(reduction, *arguments) -> int:
    return temporary(lambda *primals: reduction(fnn.backprop(COST, *primals), *arguments))


def outputs(params, x):
    for W, b in params[:-1]:
        x = jnp.tanh(W @ x + b)
    W, b = params[-1]
    return W @ x + b


def test_reductions_need_at_most_three_times_the_memory_of_a_gradient():
    """Measured: gradient 98 KiB, 1.34 times that for norms, 1.01 clipped, 1.62 Gram; second moment 2.99, for
    the squares of X, 196 KiB, are a factor of a product (jaxlib 0.10 to 0.12, with conftest's flags or
    without)."""
    gradient = temporary(lambda *primals: fnn.value_and_grad(COST)(*primals)[1])
    assert of(fnn.example_norms) <= 1.5 * gradient
    assert of(fnn.clipped_gradient, 1.0) <= 1.1 * gradient
    assert of(fnn.gram) <= 1.8 * gradient
    assert of(fnn.second_moment) <= 3.1 * gradient


def test_clipping_needs_a_four_hundredth_of_the_memory_of_gradients_written_out():
    """Measured: 99 KiB and 550 times that."""

    def written_out(params, X, y):
        def loss(params, x, y):
            z = outputs(params, x)
            return jax.nn.logsumexp(z) - z[y]

        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, X, y)
        squares = [jnp.sum(g.reshape(len(X), -1) ** 2, axis=1) for g in jax.tree.leaves(gradients)]
        factors = jnp.minimum(1, 1 / jnp.sqrt(sum(squares))) / len(X)
        return jax.tree.map(lambda g: jnp.tensordot(factors, g, axes=1), gradients)

    assert temporary(written_out) >= 400 * of(fnn.clipped_gradient, 1.0)


def test_diagonal_needs_a_four_hundredth_of_the_memory_of_jacobians_contracted():
    """Measured: 413 KiB and 2,037 times that."""

    def contracted(params, X, y):
        def hessian(x):
            p = jax.nn.softmax(outputs(params, x))
            return jnp.diag(p) - jnp.outer(p, p)

        H = jax.vmap(hessian)(X)
        Js = jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(params, X)
        return jax.tree.map(lambda J: jnp.einsum("nk...,nkl,nl...->...", J, H, J) / len(X), Js)

    assert temporary(contracted) >= 400 * temporary(partial(fnn.gauss_newton_diagonal, COST))
