"""How many examples per second does training take in, beside other libraries and the machine's peak?

    python -m experiments.benchmarks.training        (25 minutes on two cores; --help lists the flags)

Networks of relu with softmax cross-entropy of class numbers, trained with Adam(1e-3) and SGD(1e-2):

    S    64-64-10, batch 32, 1,408 of the handwritten digits, 20 epochs in each measurement; 1,500 where whole
         runs are compiled, which takes about as long
    M    784-512-512-10, batch 128, 2,048 made-up examples, 4 epochs and 48
    L    1024-4096-4096-1024, batch 512, 4,096 made-up examples, 2 epochs, which are 16 steps, and 6

    fnn.fit         as it stands in the README, without validation, metrics and bar
    fnn.train_step  the same step, all epochs as one compiled scan: what fit's calls cost is the difference
    jax.grad        of the same cost in plain JAX with optax: all epochs are one compiled scan; with orders by
                    jax.random.permutation, and in a row of its own by what fit makes them with
    Equinox         its documented loop: a step under eqx.filter_jit, batches from a permutation
    Flax NNX        its documented loop: a step under nnx.jit, nnx.Optimizer, batches by NumPy; and the step
                    with nnx.cached_partial, as its guide to performance has it
    PyTorch         its documented loop: zero_grad, backward, step. "fused" is the optimiser's fused=True;
                    "compiled" is torch.compile of the model; "DataLoader" takes the batches from one with
                    shuffle=True, the others index the tensors by slices of torch.randperm
    scikit-learn    MLPClassifier; not at L, where a class has no example
    bfloat16        products of bfloat16 numbers; parameters, optimiser and softmax in float32: by
                    fnn.mlp(..., dtype=jnp.bfloat16), by a cast of the parameters in each step of jax.grad's
                    scan, and by torch.autocast. "sums in float32" asks for forward products with
                    preferred_element_type=float32 and rounds them after

All else is float32. Every row begins with the same weights and makes its steps in an order shuffled for
every epoch, on data that are in memory beforehand as arrays of that library. A measurement is a whole run
from these weights: it includes the optimiser's state, which at L is a few per cent, and leaves out all
compilation. In a round every row has its turn, in another order each time. Examples per second are of the
median of the rounds; "time / fit's" is the ratio of the medians, and in brackets the range that holds the
middle half of the ratios within a round.

"alone" are the products of one epoch's steps, as `fit` asks for them but without what is between them, and
the optimiser's updates of as many steps, each timed in the same rounds: what of the peak is missing is lost
within the products, in the optimiser, or in the rest.

"of the peak": a step on m examples has products of 2 m n_l n_(l-1) operations for the forward pass of layer
l, as many for its gradient and, but in the first layer, as many for the errors below it, in all

    2 m (3 Σ_l n_l n_(l-1) - n_1 n_0)

and these, over the time of a step, are divided by the most that one large square product in the row's dtype
reached in the same rounds, by JAX or PyTorch. Written to training.txt beside the script.

Found, on two cores. At S `fit` is 13 to 64 times as fast as the loops of Equinox, Flax NNX and PyTorch, 12
times as scikit-learn's, and has 1.29 (Adam) and 1.36 (SGD) of the rate of one scan of jax.grad's step with
jax.random.permutation, whose sort is a third of the time (shuffling.py); of one with the orders of `fit` it
has 0.96 and 0.99. At M it has 1.04 and 1.00 of the rate of jax.grad's scan, 2.3 to 3.1 times PyTorch's, and
61 and 71 % of the peak. At L it has 0.98 of the scan's rate, with the checks and the copy of the state at its
start; 80 to 81 % of the peak; and 2.0 and 2.1 times the rate of PyTorch's best, whose products reach half of
XLA's peak on this processor. Where both reach the same, the distance is smaller. Products in bfloat16 make
`fit` 1.3 times as fast at M and 1.8 times at L, and jax.grad's scan slower; that is 1.3 times the rate of
PyTorch's best in bfloat16 at M, and 1.19 (Adam) and 1.18 (SGD) at L.
"""

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from experiments import digits
from experiments.benchmarks.timing import ratio, rounds_of, seconds
from fnn.elementary import matmul, times_transposed, transposed
from fnn.orders import shuffle
from fnn.tables import aligned


class Size(NamedTuple):
    widths: tuple[int, ...]
    N: int
    batch_size: int
    epochs: int  # in each measurement
    compiled: int  # as many epochs where all of them are compiled
    times: int  # as many rounds as --rounds says


SIZES = {
    "S": Size((64, 64, 10), 1408, 32, 20, 75, 3),
    "M": Size((784, 512, 512, 10), 2048, 128, 4, 12, 3),
    "L": Size((1024, 4096, 4096, 1024), 4096, 512, 2, 3, 1),
}
QUICK = {
    "S": SIZES["S"]._replace(epochs=2, compiled=1, times=1),
    "M": SIZES["M"]._replace(N=512, epochs=1, compiled=1, times=1),
    "L": Size((128, 512, 512, 128), 256, 64, 1, 1, 1),
}
RATES = {"Adam": 1e-3, "SGD": 1e-2}
# Of the square product that is taken for the machine's peak; and how often it is tried in a round.
SIDE, QUICK_SIDE, REPEATS = 2048, 512, 3
DISTRIBUTIONS = ("jax", "jaxlib", "optax", "equinox", "flax", "torch", "scikit-learn")


class Task(NamedTuple):
    """What every row trains: a network's start, data, and how."""

    start: list[tuple[np.ndarray, np.ndarray]]  # W (n_out, n_in) and b of every layer
    X: np.ndarray
    y: np.ndarray
    batch_size: int
    optimizer: str
    rate: float


class Training(NamedTuple):
    """A task in one library."""

    run: Callable[[int], Any]  # trains for so many epochs from the start, and returns when that is done
    weights: Callable[
        [Any], list[tuple[Any, Any]]
    ]  # of what `run` returned: W (n_out, n_in), b of every layer


# How each library trains.


def of_optax(task: Task) -> optax.GradientTransformation:
    return {"Adam": optax.adam, "SGD": optax.sgd}[task.optimizer](task.rate)


def by_fit(task: Task, dtype: Any = None) -> Training:
    cost = fnn.cost(fnn.mlp(fnn.relu, dtype=dtype), fnn.softmax_cross_entropy_with_integer_labels)
    params = tuple(fnn.Layer(jnp.asarray(W), jnp.asarray(b)) for W, b in task.start)
    data, optimizer, key = (jnp.asarray(task.X), jnp.asarray(task.y)), of_optax(task), jax.random.key(0)

    def run(epochs):
        options: dict[str, Any] = dict(epochs=epochs, batch_size=task.batch_size, progress=False)
        return jax.block_until_ready(fnn.fit(cost, optimizer, params, data, key=key, **options).params)

    return Training(run, list)


def by_step(task: Task) -> Training:
    """All epochs in one compiled call."""
    cost = fnn.cost(fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels)
    params = tuple(fnn.Layer(jnp.asarray(W), jnp.asarray(b)) for W, b in task.start)
    data, optimizer, key = (jnp.asarray(task.X), jnp.asarray(task.y)), of_optax(task), jax.random.key(0)

    @partial(jax.jit, static_argnames="epochs", donate_argnames="state")
    def train(state, epochs):
        def epoch(state, _):
            return fnn.train_epoch(cost, optimizer, state, data, task.batch_size)

        return jax.lax.scan(epoch, state, None, length=epochs)  # with the costs, as in the other rows

    def run(epochs):
        return jax.block_until_ready(train(fnn.train_state(optimizer, params, key), epochs))[0].params

    return Training(run, list)


def by_grad(
    task: Task, dtype: Any = jnp.float32, wide_sums: bool = False, permutation: Any = jax.random.permutation
) -> Training:
    """All epochs in one compiled call.

    dtype: of the factors of the products. The parameters that the optimiser keeps are float32.
    wide_sums: products are asked for in float32, then rounded
    permutation: (key, N) -> the order of an epoch
    """
    matmul = partial(jnp.matmul, preferred_element_type=jnp.float32 if wide_sums else None)
    start = jax.tree.map(jnp.asarray, task.start)
    X, y, optimizer = jnp.asarray(task.X), jnp.asarray(task.y), of_optax(task)

    def cost(params, X, y):
        A, params = X.astype(dtype), jax.tree.map(lambda a: a.astype(dtype), params)
        for W, b in params[:-1]:
            A = jax.nn.relu(matmul(A, W.T).astype(dtype) + b)
        W, b = params[-1]
        Z = (matmul(A, W.T).astype(dtype) + b).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(Z, y).mean()

    def step(X, y, carry, rows):
        params, state = carry
        C, gradient = jax.value_and_grad(cost)(params, X[rows], y[rows])
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), C

    @partial(jax.jit, static_argnames="epochs")
    def train(params, X, y, key, epochs):
        def epoch(carry, key):
            order = permutation(key, len(X)).reshape(-1, task.batch_size)
            return jax.lax.scan(partial(step, X, y), carry, order)

        (params, _), costs = jax.lax.scan(
            epoch, (params, optimizer.init(params)), jax.random.split(key, epochs)
        )
        return params, costs

    def run(epochs):
        return jax.block_until_ready(train(start, X, y, jax.random.key(0), epochs))[0]

    return Training(run, list)


def fit_order(key: Any, N: int) -> Any:
    return shuffle(key, N)[1]


def by_equinox(task: Task) -> Training:
    eqx: Any = import_module("equinox")

    def weights(model):
        return [(layer.weight, layer.bias) for layer in model.layers]

    widths = [len(b) for _, b in task.start]
    n_in, hidden = task.X.shape[1], widths[:-1]
    assert len(set(hidden)) == 1, "eqx.nn.MLP has hidden layers of one width"
    model = eqx.nn.MLP(n_in, widths[-1], hidden[0], len(hidden), key=jax.random.key(0))
    parts = [jnp.asarray(a) for layer in task.start for a in layer]
    start = eqx.tree_at(lambda model: [a for layer in weights(model) for a in layer], model, parts)
    X, y, optimizer = jnp.asarray(task.X), jnp.asarray(task.y), of_optax(task)

    def cost(model, X, y):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(X), y).mean()

    @eqx.filter_jit
    def step(model, state, X, y):
        C, gradient = eqx.filter_value_and_grad(cost)(model, X, y)
        updates, state = optimizer.update(gradient, state, model)
        return eqx.apply_updates(model, updates), state, C

    def batches(epochs):
        for key in jax.random.split(jax.random.key(0), epochs):
            order = jax.random.permutation(key, len(X))
            for i in range(0, len(X), task.batch_size):
                rows = order[i : i + task.batch_size]
                yield X[rows], y[rows]

    def run(epochs):
        model, state = start, optimizer.init(eqx.filter(start, eqx.is_array))
        for X, y in batches(epochs):
            model, state, _ = step(model, state, X, y)
        return jax.block_until_ready(model)

    return Training(run, weights)


def by_flax(task: Task, cached: bool = False) -> Training:
    nnx: Any = import_module("flax.nnx")
    parts = []
    for W, b in task.start:
        linear = nnx.Linear(W.shape[1], W.shape[0], rngs=nnx.Rngs(0))
        linear.kernel[...], linear.bias[...] = jnp.asarray(W.T), jnp.asarray(b)
        parts += [linear, nnx.relu]
    start = nnx.Sequential(*parts[:-1])
    start_optimizer = nnx.Optimizer(start, of_optax(task), wrt=nnx.Param)

    def cost(model, X, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(X), y).mean()

    @nnx.jit
    def step(model, optimizer, X, y):
        C, gradient = nnx.value_and_grad(cost)(model, X, y)
        optimizer.update(model, gradient)
        return C

    def run(epochs):
        model, optimizer = nnx.clone(start), nnx.clone(start_optimizer)
        one = nnx.cached_partial(step, model, optimizer) if cached else partial(step, model, optimizer)
        for rows in shuffled_by_numpy(task, epochs):
            one(task.X[rows], task.y[rows])
        return jax.block_until_ready(nnx.state(model)) and model

    def weights(model):
        return [(layer.kernel[...].T, layer.bias[...]) for layer in model.layers[::2]]

    return Training(run, weights)


def shuffled_by_numpy(task: Task, epochs: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    for _ in range(epochs):
        order = generator.permutation(len(task.X))
        for i in range(0, len(order), task.batch_size):
            yield order[i : i + task.batch_size]


def by_torch(
    task: Task,
    fused: bool = False,
    compiled: bool = False,
    loader: bool = False,
    autocast: bool = False,
    threads: int | None = None,
) -> Training:
    torch: Any = import_module("torch")
    all_threads = torch.get_num_threads()
    parts, start = [], [torch.tensor(a) for layer in task.start for a in layer]
    for W, _ in task.start:
        parts += [torch.nn.Linear(W.shape[1], W.shape[0]), torch.nn.ReLU()]
    model = torch.nn.Sequential(*parts[:-1])
    forward = model
    if compiled:
        torch.compiler.reset()  # of the other sizes, as it compiles for a few shapes and then no more
        forward = torch.compile(model)
    loss = torch.nn.CrossEntropyLoss()
    X, y = torch.tensor(task.X), torch.tensor(task.y, dtype=torch.int64)
    data = torch.utils.data.TensorDataset(X, y)
    from_loader = torch.utils.data.DataLoader(data, batch_size=task.batch_size, shuffle=True)

    def from_slices():
        for rows in torch.randperm(len(X)).split(task.batch_size):
            yield X[rows], y[rows]

    def run(epochs):
        torch.set_num_threads(threads or all_threads)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        make = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[task.optimizer]
        optimizer = make(model.parameters(), lr=task.rate, fused=fused)
        for _ in range(epochs):
            for X_batch, y_batch in from_loader if loader else from_slices():
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    C = loss(forward(X_batch), y_batch)
                C.backward()
                optimizer.step()
        torch.set_num_threads(all_threads)
        return model

    def weights(model):
        return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in model[::2]]

    return Training(run, weights)


def by_sklearn(task: Task) -> Training:
    network: Any = import_module("sklearn.neural_network")
    ignored: Any = import_module(
        "sklearn.exceptions"
    ).ConvergenceWarning  # it is to stop after so many epochs
    assert len(np.unique(task.y)) == len(task.start[-1][1]), "it counts the classes in y"
    classifier = network.MLPClassifier(
        hidden_layer_sizes=tuple(len(b) for _, b in task.start[:-1]),
        solver=task.optimizer.lower(),
        learning_rate_init=task.rate,
        momentum=0.0,
        alpha=0.0,
        batch_size=task.batch_size,
        tol=0.0,
        n_iter_no_change=np.inf,  # or a run compares its cost with the last run's, and ends early
        warm_start=True,  # from coefs_ and intercepts_, with an optimiser that is new
    )

    def run(epochs):
        classifier.set_params(max_iter=epochs)
        if hasattr(classifier, "coefs_"):
            classifier.coefs_ = [np.array(W.T, order="C") for W, _ in task.start]
            classifier.intercepts_ = [b.copy() for _, b in task.start]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ignored)
            return classifier.fit(task.X, task.y)

    def weights(classifier):
        return [(W.T, b) for W, b in zip(classifier.coefs_, classifier.intercepts_, strict=True)]

    run(1)  # makes coefs_
    return Training(run, weights)


class Row(NamedTuple):
    name: str
    needs: str  # a module; without it the row says so
    of: Callable[[Task], Training]
    dtype: str = "float32"  # of the products
    sizes: str = "SML"
    compiled: bool = False  # all epochs
    quick: bool = True  # whether it is also in a --quick run


# Another row is another line here; the test of this file then holds it to the same training as the others.
ROWS = [
    Row("fnn.fit", "fnn", by_fit, compiled=True),
    Row("fnn.train_step, one scan", "fnn", by_step, compiled=True),
    Row("jax.grad, one scan", "jax", by_grad, compiled=True),
    Row("jax.grad, one scan, fit's orders", "jax", partial(by_grad, permutation=fit_order), compiled=True),
    Row("Equinox", "equinox", by_equinox),
    Row("Flax NNX", "flax", by_flax),
    Row("Flax NNX, cached_partial", "flax", partial(by_flax, cached=True), sizes="SM"),
    Row("PyTorch", "torch", by_torch),
    Row("PyTorch, fused", "torch", partial(by_torch, fused=True)),
    Row("PyTorch, fused, one thread", "torch", partial(by_torch, fused=True, threads=1), sizes="S"),
    Row("PyTorch, fused, DataLoader", "torch", partial(by_torch, fused=True, loader=True), sizes="SM"),
    Row("PyTorch, fused, compiled", "torch", partial(by_torch, fused=True, compiled=True), quick=False),
    Row("scikit-learn", "sklearn", by_sklearn, sizes="SM"),
    Row("fnn.fit, bfloat16", "fnn", partial(by_fit, dtype=jnp.bfloat16), "bfloat16", compiled=True),
    Row(
        "jax.grad, one scan, bfloat16", "jax", partial(by_grad, dtype=jnp.bfloat16), "bfloat16", compiled=True
    ),
    Row(
        "jax.grad, one scan, bfloat16, sums in float32",
        "jax",
        partial(by_grad, dtype=jnp.bfloat16, wide_sums=True),
        "bfloat16",
        compiled=True,
    ),
    Row("PyTorch, fused, bfloat16", "torch", partial(by_torch, fused=True, autocast=True), "bfloat16"),
    Row(
        "PyTorch, fused, compiled, bfloat16",
        "torch",
        partial(by_torch, fused=True, compiled=True, autocast=True),
        "bfloat16",
        quick=False,
    ),
]


# What is measured.


def task_of(name: str, size: Size, optimizer: str) -> Task:
    keys = jax.random.split(jax.random.key(0), 3)
    params = fnn.init(keys[0], size.widths, weights=fnn.he_normal, dtype=jnp.float32)
    if name == "S":
        (X, y), _ = digits.load(0)
        X, y = digits.standardised(X, X)[: size.N], y[: size.N]
    else:
        X = jax.random.normal(keys[1], (size.N, size.widths[0]), jnp.float32)
        y = jax.random.randint(keys[2], (size.N,), 0, size.widths[-1], jnp.int32)
    start = [(np.array(W), np.array(b)) for W, b in params]
    return Task(start, np.array(X), np.array(y), size.batch_size, optimizer, RATES[optimizer])


def operations(widths: tuple[int, ...], m: int) -> int:
    """Of the products of one step on m examples: 2 m (3 Σ_l n_l n_(l-1) - n_1 n_0)."""
    return 2 * m * (3 * sum(n * k for n, k in zip(widths[1:], widths)) - widths[1] * widths[0])


def products(side: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """(dtype, library) -> one square product of 2 side³ operations."""
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    # Asked for in bfloat16, the product of two bfloat16 arrays is one of float32 on some CPUs.
    matmul = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    square = jax.random.normal(jax.random.key(0), (side, side))
    for dtype in ("float32", "bfloat16"):
        a = square.astype(dtype)
        found[dtype, "JAX"] = lambda a=a: jax.block_until_ready(matmul(a, a))
        if find_spec("torch"):
            torch: Any = import_module("torch")
            b = torch.tensor(np.array(square)).to(getattr(torch, dtype))
            found[dtype, "PyTorch"] = lambda b=b: b @ b
    return found


def alone(task: Task, steps: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """(dtype, part) -> the products of so many steps of `fit` without the rest of them, or the optimiser."""
    optimizer, m = of_optax(task), task.batch_size
    start = [(jnp.asarray(W), jnp.asarray(b)) for W, b in task.start]
    found: dict[tuple[str, str], Callable[[], Any]] = {}

    @jax.jit
    def products_of_a_step(weights, inputs, errors):
        forward = [times_transposed(A, W) for A, W in zip(inputs, weights, strict=True)]
        gradient = [matmul(transposed(delta), A) for A, delta in zip(inputs, errors, strict=True)]
        return forward, gradient, [matmul(delta, W) for delta, W in zip(errors[1:], weights[1:], strict=True)]

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def all_products(arrays):
        out = None
        for _ in range(steps):
            out = products_of_a_step(*arrays)
        return jax.block_until_ready(out)

    def all_updates(carry, gradient):
        for _ in range(steps):
            carry[:] = update(*carry, gradient)
        return jax.block_until_ready(carry)

    for dtype in ("float32", "bfloat16"):
        weights = [W.astype(dtype) for W, _ in start]
        normal = partial(jax.random.normal, jax.random.key(0), dtype=dtype)
        arrays = weights, *([normal((m, W.shape[axis])) for W in weights] for axis in (1, 0))
        found[dtype, "products"] = partial(all_products, arrays)
        carry = [jax.tree.map(jnp.copy, start), optimizer.init(start)]  # float32 in either
        found[dtype, task.optimizer] = partial(all_updates, carry, jax.tree.map(jnp.ones_like, start))
    return found


def table(name: str, size: Size, optimizer: str, rounds: int, side: int, quick: bool) -> str:
    task = task_of(name, size, optimizer)
    rows = [row for row in ROWS if name in row.sizes and (row.quick or not quick)]
    there = [row for row in rows if find_spec(row.needs)]
    epochs = [size.epochs * (size.compiled if row.compiled else 1) for row in there]
    runs = [partial(row.of(task).run, n) for row, n in zip(there, epochs, strict=True)]
    steps, of_a_step = size.N // size.batch_size, operations(size.widths, size.batch_size)
    squares = products(side) if name != "S" else {}
    parts = alone(task, steps) if name != "S" else {}
    for run in [*runs, *parts.values(), *squares.values()]:
        seconds(run)  # compiles
    times = rounds_of([*runs, *parts.values(), *REPEATS * list(squares.values())], rounds)
    times[:, : len(runs)] /= epochs  # seconds for an epoch
    of_parts = np.median(times[:, len(runs) : len(runs) + len(parts)], axis=0)
    best = times[:, len(runs) + len(parts) :].reshape(rounds, REPEATS, len(squares)).min(axis=(0, 1))
    speeds = {key: 2 * side**3 / t for key, t in zip(squares, best, strict=True)}  # operations per second
    peaks = {dtype: max(speed for (d, _), speed in speeds.items() if d == dtype) for dtype, _ in speeds}

    head = f"{name}, {optimizer}", "examples / s", "ms / step", "time / fit's", "of the peak" if peaks else ""
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        if row not in there:
            cells.append((row.name, "not installed", "", "", ""))
            continue
        i = there.index(row)
        median = float(np.median(times[:, i])) / steps
        share = f"{of_a_step / median / peaks[row.dtype]:.0%}" if peaks else ""
        rate = f"{size.batch_size / median:,.0f}"
        cells.append((row.name, rate, f"{1e3 * median:,.3g}", ratio(times, i, 0), share))
    lines = [aligned(cells, "<>>>>")]
    if peaks:
        each = ", ".join(f"{dtype} {whose} {speed / 1e9:.0f}" for (dtype, whose), speed in speeds.items())
        lines.append(f"peak, 10^9 operations per second: {each}; a step has {of_a_step / 1e9:.3g}·10^9")
    for i, row in enumerate(there):
        if parts and row.name.startswith("fnn.fit"):
            whole = float(np.median(times[:, i]))
            shares = (
                f"{part} {t / whole:.0%}"
                for (dtype, part), t in zip(parts, of_parts, strict=True)
                if dtype == row.dtype
            )
            lines.append(f"alone, of the time of {row.name}: {', '.join(shares)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3, help="at L; three times as many at S and M")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: few steps, a small L, one round, no torch.compile"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"), help="the tables")
    flags = parser.parse_args()
    sizes, side = (QUICK, QUICK_SIDE) if flags.quick else (SIZES, SIDE)
    parts = []
    for name in flags.sizes:
        for optimizer in RATES:
            size = sizes[name]
            rounds = 1 if flags.quick else size.times * flags.rounds
            parts.append(table(name, size, optimizer, rounds, side, flags.quick))
            print(parts[-1], end="\n\n", flush=True)
    cores = len(os.sched_getaffinity(0))
    device = f"{jax.devices()[0].platform}, {cores} core{'s' * (cores > 1)}"
    installed = [name for name in DISTRIBUTIONS if find_spec({"scikit-learn": "sklearn"}.get(name, name))]
    versions = ", ".join(f"{name} {version(name)}" for name in installed)
    rounds = "1 round" if flags.quick else f"{flags.rounds} rounds at L, {3 * flags.rounds} at S and M"
    parts.append(f"{versions}, {device}, {rounds}")
    print(parts[-1])
    flags.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
