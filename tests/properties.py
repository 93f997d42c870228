"""What must hold of every rule. Each property asserts; `test_the_tests.py` runs them on planted faults."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.strategies import INSTANCES, Case, instance, tolerance


def assert_close(got, want, dtype, *, what: str, fan_in: int = 1, terms: float = 0.0):
    """Every entry within `tolerance` of the largest reference entry; not finite where that is not.

    terms: the largest size of what is summed up to an entry, where it may cancel
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=what)
    finite = np.isfinite(want)
    error = np.abs(np.where(finite, got, 0) - np.where(finite, want, 0))
    allowed = tolerance(dtype, fan_in) * np.abs(want[finite]).max(initial=terms)
    worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
    assert error.max(initial=0) <= allowed, (
        f"{what}: {got[worst]} at {worst}, expected {want[worst]}: "
        f"off by {error[worst]:.3g}, allowed {allowed:.3g}"
    )


def split(primals):
    """The float primals and a function that puts the others back among them."""
    is_float = [all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(p)) for p in primals]
    floats = [p for p, f in zip(primals, is_float, strict=True) if f]

    def merge(floats):
        remaining = iter(floats)
        return [next(remaining) if f else p for p, f in zip(primals, is_float, strict=True)]

    return is_float, floats, merge


class Evaluation(NamedTuple):
    """What one compiled call gives for every instance, in float64 where a projection is taken."""

    value: Any
    called: Any  # the rule called, which is its forward
    out_bar: Any  # the cotangent
    ours: list  # the pullback's adjoints of the float primals
    theirs: list  # jax.vjp's: the transpose of
    Jv: Any  # jax.jvp's


@cache
def _evaluator(rule):
    """Compiled once for a rule and a shape.

    numbers: as many as the output may have; the first of them are its cotangent
    """

    @jax.jit
    @jax.vmap
    def evaluate(primals, numbers, v):
        is_float, floats, merge = split(primals)
        value, residuals = rule.forward(*primals)
        out_bar = numbers[: value.size].reshape(value.shape).astype(value.dtype)
        adjoints = rule.pullback(residuals, out_bar)
        check_contract(primals, is_float, adjoints)
        ours = [a for a, f in zip(adjoints, is_float, strict=True) if f]
        # As jax.vjp and jax.jvp do, but f is traced once for both.
        called, push = jax.linearize(lambda *floats: rule(*merge(floats)), *floats)
        theirs = jax.linear_transpose(push, *floats)(out_bar)
        return Evaluation(value, called, out_bar, ours, list(theirs), push(*v))

    return evaluate


def check_contract(primals, is_float, adjoints):
    """One adjoint per primal, of its structure, shapes and dtypes; None for integers."""
    assert isinstance(adjoints, tuple) and len(adjoints) == len(primals)
    for primal, adjoint, differentiable in zip(primals, adjoints, is_float, strict=True):
        if not differentiable:
            assert adjoint is None
            continue
        assert jax.tree.structure(adjoint) == jax.tree.structure(primal)
        for a, p in zip(jax.tree.leaves(adjoint), jax.tree.leaves(primal), strict=True):
            assert (a.shape, a.dtype) == (p.shape, p.dtype)


def check_against_autodiff(result: Evaluation, dtype, fan_in: int):
    """Every adjoint equals `jax.vjp`'s."""
    # Not bitwise: both stand in one program, and XLA may fuse its two copies of them differently.
    assert_close(result.called, result.value, dtype, what="rule(...)", fan_in=fan_in)
    assert jax.tree.structure(result.ours) == jax.tree.structure(result.theirs)
    pairs = zip(jax.tree.leaves_with_path(result.ours), jax.tree.leaves(result.theirs), strict=True)
    for (path, a), b in pairs:
        assert a.dtype == b.dtype
        what = f"adjoint {jax.tree_util.keystr(path)} against jax.vjp"
        assert_close(a, b, dtype, what=what, fan_in=fan_in)


def check_adjointness(result: Evaluation, v, dtype, fan_in: int):
    """⟨ȳ, Jv⟩ = ⟨Jᵀȳ, v⟩ with Jv from forward mode, for every instance.

    Projections are taken in float64 and compared in units of ‖ȳ‖‖Jv‖ + ‖Jᵀȳ‖‖v‖, the largest of the draw:
    where a slope passes through zero, as silu's does near -1.28, nothing but rounding is left of it.
    """

    def inner(a, b):
        total = np.zeros(INSTANCES)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            total += (np.float64(x) * np.float64(y)).reshape(INSTANCES, -1).sum(axis=1)
        return total

    def length(a):
        return np.sqrt(inner(a, a))

    defect = np.abs(inner(result.out_bar, result.Jv) - inner(result.ours, v))
    size = length(result.out_bar) * length(result.Jv) + length(result.ours) * length(v)
    allowed = tolerance(dtype, fan_in) * size.max()
    assert defect.max() <= allowed, f"adjointness: {defect.max():.3g}, allowed {allowed:.3g}"


def check_against_formula(case: Case, primals, value, dtype, fan_in: int, instances: int):
    """The value equals the independent formula's, evaluated on the same rounded numbers in float64."""
    want = np.array([case.value(*instance(primals, i)) for i in range(instances)])
    assert value.dtype == jnp.dtype(dtype)
    assert_close(np.asarray(value)[:instances], want, dtype, what="value against the formula", fan_in=fan_in)


def check_against_differences(case: Case, primals, result: Evaluation, v, instances: int):
    """⟨ȳ, f(x+hv) - f(x-hv)⟩ / 2h = ⟨Jᵀȳ, v⟩ in float64, f the independent formula.

    Returns how many instances lie off the kinks, where a difference has a meaning. With h = 1e-5 the
    truncation h²f‴/6 is about 1e-10 and the rounding eps·f/h about 1e-11.
    """
    h, judged = 1e-5, 0
    for i in range(instances):
        x = instance(primals, i)
        if not case.smooth(*x):
            continue
        judged += 1
        is_float, floats, merge = split(x)
        bars, tangents = instance(result.ours, i), instance(v, i)

        def moved(step, floats=floats, merge=merge, tangents=tangents):
            return np.asarray(case.value(*merge(jax.tree.map(lambda a, d: a + step * d, floats, tangents))))

        change = moved(h) - moved(-h)
        by_difference = float(np.sum(np.asarray(result.out_bar)[i] * change) / (2 * h))
        pairs = list(zip(jax.tree.leaves(bars), jax.tree.leaves(tangents), strict=True))
        by_hand = sum(float(np.sum(b * t)) for b, t in pairs)
        size = (sum(np.sum(b**2) for b, _ in pairs) * sum(np.sum(t**2) for _, t in pairs)) ** 0.5
        # The floor is for instances whose gradient is zero, such as a single relu below its kink.
        assert abs(by_hand - by_difference) <= 1e-7 * (size + 1e-2), f"{by_hand=}, {by_difference=}"
    return judged


def check_rule(case: Case, size, dtype, seed: int, instances: int = INSTANCES):
    """Every property of a rule on one draw of its arguments.

    False if all of them lie on a kink: a network without biases does whenever a layer before is dead.
    """
    rng = np.random.default_rng(seed)
    primals = case.draw(rng, size, dtype)
    fan_in = max(leaf.size // INSTANCES for leaf in jax.tree.leaves(primals))
    _, floats, _ = split(primals)
    v = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), floats)
    result = _evaluator(case.rule)(primals, rng.standard_normal((INSTANCES, fan_in)), v)
    check_against_formula(case, primals, result.value, dtype, fan_in, instances)
    check_against_autodiff(result, dtype, fan_in)
    check_adjointness(result, v, dtype, fan_in)
    if dtype == "float64":
        return check_against_differences(case, primals, result, v, instances) > 0
    return True


# Of the sweep. `fnn` is the package under test, which may be a copy with a planted fault.


def check_sweep(fnn, cost, params, X, y, *weight):
    """δ^l_n = ∂C_n/∂z^l_n by autodiff: the gradient with respect to a nudge added to z^l of every example.

    And the gradient made of them is the cost's, penalty and weights included.
    """

    @jax.jit
    def by_hand(params, X, y, *weight):
        sweep = fnn.backprop(cost, params, X, y, *weight)
        return sweep, fnn.gradient(sweep)

    sweep, got = by_hand(params, X, y, *weight)
    nudges = [np.zeros((len(X), layer.W.shape[0])) for layer in params]

    def losses(nudges):
        A = X
        for (W, b), activation, nudge in zip(params, cost.net.activations(params), nudges, strict=True):
            Z = A @ W.T + nudge
            A = activation(Z if b is None else Z + b[None, :])
        return cost.loss(A, y)

    @jax.jit
    def autodiff(nudges):
        return losses(nudges), jax.grad(lambda nudges: losses(nudges).sum())(nudges)

    values, expected = jax.device_get(autodiff(nudges))
    np.testing.assert_allclose(sweep.losses, values, rtol=1e-12)
    assert len(sweep.errors) == len(params)
    # A running bound of the rounding: the same recursion on absolute values. Nothing cancels there, as it
    # does where a loss subtracts y (or 1, the label's probability) and softmax a mean; no activation has a
    # slope beyond 1.13, and every step has slack.
    y_terms = np.abs(y) if jnp.issubdtype(y.dtype, jnp.floating) else np.float64(1)
    terms = np.maximum(np.abs(expected[-1]), y_terms)
    want = jax.device_get(jax.jit(jax.grad(cost))(params, X, y, *weight))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for l in reversed(range(len(params))):
        terms = np.maximum(terms, np.abs(expected[l]))
        what, size = f"δ^{l + 1}", float(terms.max())
        assert_close(sweep.errors[l], expected[l], "float64", what=what, fan_in=8, terms=size)
        for a, b in zip(jax.tree.leaves(got[l]), jax.tree.leaves(want[l]), strict=True):
            size = float(
                (np.asarray(sweep.weights)[:, None] * terms).sum(axis=0).max()
                * max(1, np.abs(sweep.inputs[l]).max())
            )
            assert_close(a, b, "float64", what=f"gradient of layer {l + 1}", fan_in=16, terms=size)
        terms = terms @ np.abs(params[l].W)


def check_feedback(fnn, cost, params, X, y):
    """δ^l with other matrices on the way back is autodiff's in a network of the same numbers and such slopes.

    z + B - stop_gradient(B) is z, with the slopes of B; z = stop_gradient(W a) would have none.
    """
    rng, stop = np.random.default_rng(0), jax.lax.stop_gradient
    other = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params)
    n_last = params[-1].W.shape[0]
    D = tuple(jnp.asarray(rng.standard_normal((n_last, layer.W.shape[0]))) for layer in params[:-1])
    nudges = [np.zeros((len(X), layer.W.shape[0])) for layer in params]
    activations = cost.net.activations(params)

    def aligned(nudges):
        A = X
        for (W, b), (F, _), activation, nudge in zip(params, other, activations, nudges, strict=True):
            Z = stop(A @ W.T) + A @ F.T - stop(A @ F.T) + nudge
            A = activation(Z if b is None else Z + b[None, :])
        return cost.loss(A, y).sum()

    def direct(nudges):
        A, hidden = X, []
        for (W, b), activation, nudge in zip(params, activations, nudges, strict=True):
            Z = stop(A @ W.T) + nudge
            if len(hidden) == len(D):
                for a, matrix in zip(hidden, D, strict=True):
                    Z = Z + a @ matrix.T - stop(a @ matrix.T)
            A = activation(Z if b is None else Z + b[None, :])
            hidden.append(A)
        return cost.loss(A, y).sum()

    for surrogate, feedback in ((aligned, other), (direct, fnn.DirectFeedback(D))):
        sweep = jax.jit(partial(fnn.backprop, cost))(params, X, y, feedback=feedback)
        expected = jax.jit(jax.grad(surrogate))(nudges)
        for l, (got, want) in enumerate(zip(sweep.errors, expected, strict=True), start=1):
            assert_close(got, want, "float64", what=f"δ^{l}", fan_in=16)


# Of training, by rules that show what the loop does with its data.


def numbered(N):
    """Data that are their own numbers."""
    return jnp.arange(N), jnp.zeros(N)


def check_visits(fnn, N, batch_size):
    """Each example is visited exactly once an epoch.

    The parameters count visits: the gradient of C = -Σ_{n in batch} p_n is -1 at every example of the batch,
    so that a step of size 1 adds one visit to each.
    """
    visits = fnn.Rule(
        lambda p, X, y: (-jnp.sum(p[X]), (p, X)),
        lambda residuals, C_bar: (jnp.zeros_like(residuals[0]).at[residuals[1]].add(-C_bar), None, None),
    )
    optimizer = optax.sgd(1.0)
    state = fnn.train_state(optimizer, jnp.zeros(N), jax.random.key(0))
    steps = -(-N // batch_size)
    for epoch in (1, 2):
        state, costs = fnn.train_epoch(visits, optimizer, state, numbered(N), batch_size)
        assert costs.shape == (steps,)
        np.testing.assert_array_equal(state.params, epoch)
    assert state.step == 2 * steps


@cache
def of_numbers(fnn):
    """A cost that is the example's number, and an optimiser: compiled once for all orders of one length."""
    number = fnn.Rule(
        lambda p, X, y: (p * 0 + X[0], p),
        lambda p, C_bar: (jnp.zeros_like(p), None, None),
    )
    return number, optax.sgd(1.0)


def orders(fnn, key, N=23, epochs=1):
    """The order of the examples in each epoch: with batches of one, a cost that is the example's number."""
    number, optimizer = of_numbers(fnn)
    state, result = fnn.train_state(optimizer, jnp.zeros(()), key), []
    for _ in range(epochs):
        state, costs = fnn.train_epoch(number, optimizer, state, numbered(N), 1)
        result.append(np.asarray(costs).astype(int).tolist())
    return result


def check_orders(fnn):
    """Fresh every epoch, and decided by the key."""
    first, second, third = orders(fnn, jax.random.key(0), epochs=3)
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second != third != first and first != list(range(23))
    assert orders(fnn, jax.random.key(0), epochs=3) == [first, second, third]
    assert orders(fnn, jax.random.key(1))[0] != first


def check_steps(fnn, case: Case):
    """Three steps of Adam are optax's own on the gradients of `jax.grad`."""
    params, *batch = case.draw_one()
    optimizer = optax.adam(0.1)
    state, reference, costs = fnn.train_state(optimizer, params, jax.random.key(0)), params, []
    optimizer_state = optimizer.init(params)

    @jax.jit
    def both(state, params, optimizer_state):
        value, gradient = jax.value_and_grad(case.rule)(params, *batch)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        theirs = optax.apply_updates(params, updates), optimizer_state, value
        return fnn.train_step(case.rule, optimizer, state, *batch), theirs

    for _ in range(3):
        (state, C), (reference, optimizer_state, value) = both(state, reference, optimizer_state)
        costs.append((C, value))
    np.testing.assert_allclose(*zip(*costs, strict=True), rtol=1e-9)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # Adam divides by the gradient's own size
