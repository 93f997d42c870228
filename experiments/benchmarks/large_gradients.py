"""What does the check of a large gradient cost, in gradients?

    python -m experiments.benchmarks.large_gradients

The hand-written gradient of networks of 10⁵ to 10⁷ parameters, in float32, judged by
`fnn.check_gradient`. Prints the medians of five calls of the gradient and of `jax.grad` in float64,
which is the truth, and the time of a check once compiled, of a first one that compiles too, and of one
that finds a single entry wrong. The ratio is of a check to one gradient and one of autodiff in float64.
Written to large_gradients.txt beside the script.
"""

import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import fnn
from fnn.tables import aligned

NETWORKS = (((256, 300, 10), 512), ((784, 1000, 200, 10), 512), ((1024, 2048, 3500, 10), 512))


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def row(sizes: tuple[int, ...], N: int) -> tuple[str, ...]:
    net = fnn.mlp(fnn.tanh)
    cost = fnn.cost(net, fnn.softmax_cross_entropy_with_integer_labels)
    key = jax.random.key(0)
    params = fnn.init(key, sizes)
    X = jax.random.normal(jax.random.fold_in(key, 1), (N, sizes[0]))
    y = jax.random.randint(jax.random.fold_in(key, 2), (N,), 0, sizes[-1])
    by_hand = jax.jit(lambda params: fnn.value_and_grad(cost)(params, X, y)[1])
    with jax.enable_x64(True):
        wide, X_wide = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (params, X))
        autodiff = jax.jit(jax.grad(lambda params: cost(params, X_wide, y)))
        autodiff(wide)
        in_float64 = statistics.median(seconds(lambda: autodiff(wide)) for _ in range(5))
    by_hand(params)
    once = statistics.median(seconds(lambda: by_hand(params)) for _ in range(5))
    reports = []

    def gradient(params, X, y):
        return fnn.value_and_grad(cost)(params, X, y)[1]

    def wrong(params, X, y):
        first, *others = gradient(params, X, y)
        return first._replace(W=first.W.at[7, 5].multiply(1.001)), *others

    def check(gradient):
        return seconds(lambda: reports.append(fnn.check_gradient(cost, gradient, params, X, y)))

    first, again, finding = check(gradient), check(gradient), check(wrong)
    verdicts = [bool(report) for report in reports]
    assert verdicts == [True, True, False], verdicts
    n = sum(x.size for x in jax.tree.leaves(params))
    times = (once, in_float64, again, first, finding)
    return f"{n:,}", str(N), *(f"{t:.3g}" for t in times), f"{again / (once + in_float64):.1f}"


def main() -> None:
    head = ("parameters", "N", "gradient", "jax.grad in float64", "check", "first", "finding one", "ratio")
    rows = [head] + [row(sizes, N) for sizes, N in NETWORKS]
    text = aligned(rows, ">" * len(head)) + f"\nseconds; jax {jax.__version__}, {jax.devices()[0].platform}\n"
    print(text)
    Path(__file__).with_suffix(".txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
