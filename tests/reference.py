"""The same functions a second time, as literal loops over Python floats: no JAX, no matrices, no autodiff.

Written from the textbook definitions, not from `fnn`, so that the two cannot share a mistake. Only values:
gradients are judged by autodiff and by differences of these values.
"""

import math
from functools import partial

# Activations of one layer: a list of numbers to a list of numbers.


def elementwise(f):
    return lambda z: [f(v) for v in z]


def _sigmoid(v):
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _softplus(v):
    return v + math.log1p(math.exp(-v)) if v > 0 else math.log1p(math.exp(v))


def _softmax(z):
    exps = [math.exp(v - max(z)) for v in z]
    return [e / sum(exps) for e in exps]


ACTIVATIONS = {
    "identity": elementwise(lambda v: v),
    "sigmoid": elementwise(_sigmoid),
    "tanh": elementwise(math.tanh),
    "relu": elementwise(lambda v: v if v > 0 else 0.0),
    "leaky_relu(0.01)": elementwise(lambda v: v if v > 0 else 0.01 * v),
    "leaky_relu(0.3)": elementwise(lambda v: v if v > 0 else 0.3 * v),
    "elu(1.0)": elementwise(lambda v: v if v > 0 else math.expm1(v)),
    "elu(0.7)": elementwise(lambda v: v if v > 0 else 0.7 * math.expm1(v)),
    "softplus": elementwise(_softplus),
    "silu": elementwise(lambda v: v * _sigmoid(v)),
    "gelu": elementwise(lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2))),
    "gelu_tanh": elementwise(
        lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    ),
    "softmax": _softmax,
}


# Losses of one example: outputs and target to a number.


def _log_softmax(z):
    top = max(z)
    log_sum = top + math.log(sum(math.exp(v - top) for v in z))
    return [v - log_sum for v in z]


def _huber(delta, e):
    return 0.5 * e * e if abs(e) <= delta else delta * (abs(e) - 0.5 * delta)


def _sum(term):
    return lambda z, y: sum(term(a, b) for a, b in zip(z, y, strict=True))


def _mean(term):
    return lambda z, y: sum(term(a, b) for a, b in zip(z, y, strict=True)) / len(z)


def _binary(p, y):
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


LOSSES = {
    "softmax_cross_entropy": lambda z, y: -sum(t * l for t, l in zip(y, _log_softmax(z), strict=True)),
    "softmax_cross_entropy_with_integer_labels": lambda z, y: -_log_softmax(z)[int(y)],
    "sigmoid_binary_cross_entropy": _sum(lambda z, y: y * _softplus(-z) + (1 - y) * _softplus(z)),
    "half_squared_error": _sum(lambda z, y: 0.5 * (z - y) ** 2),
    "squared_error": _sum(lambda z, y: (z - y) ** 2),
    "mean_squared_error": _mean(lambda z, y: (z - y) ** 2),
    "mean_absolute_error": _mean(lambda z, y: abs(z - y)),
    "huber_loss(1.0)": _mean(lambda z, y: _huber(1.0, z - y)),
    "huber_loss(0.5)": _mean(lambda z, y: _huber(0.5, z - y)),
    "categorical_cross_entropy": lambda p, y: -sum(t * math.log(q) for t, q in zip(y, p, strict=True) if t),
    "binary_cross_entropy": _sum(_binary),
}


# Gates: numbers to a number, for every entry; or whole arrays, as nested lists, to a number or a list.

ENTRYWISE = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "maximum": lambda x, y: x if x > y else y,
    "exp": math.exp,
    "log": math.log,
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x * x,
    "sin": math.sin,
    "cos": math.cos,
    "shift(0.7)": lambda x: x + 0.7,
    "scale(-1.3)": lambda x: -1.3 * x,
    "power(3.0)": lambda x: x * x * x,
    "power(-2.0)": lambda x: 1 / (x * x),
    "power(0.5)": math.sqrt,
    "power(0.0)": lambda x: 1.0,
}
WHOLE = {
    "sum": lambda x: sum(x.ravel().tolist()),
    "squared_norm": lambda x: sum(v * v for v in x.ravel().tolist()),
    "dot": lambda x, y: sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)),
    "matmul": lambda W, x: [
        [sum(w * v for w, v in zip(row, column, strict=True)) for column in zip(*x.tolist(), strict=True)]
        for row in W.tolist()
    ],
}


def network(activations, params, X):
    """(z^1..z^L, a^L) for every example, by the sums of the definition."""
    results = []
    for x in X:
        a, zs = [float(v) for v in x], []
        for activation, (W, b) in zip(activations, params, strict=True):
            z = []
            for i in range(len(W)):
                total = 0.0 if b is None else float(b[i])
                for j in range(len(a)):
                    total += float(W[i][j]) * a[j]
                z.append(total)
            zs.append(z)
            a = ACTIVATIONS[activation](z)
        results.append((zs, a))
    return results


def cost(activations, loss, params, X, y, sample_weight=None, *, l2=0.0, reduction="mean"):
    """Weighted mean of the losses and half of l2 times the sum of all squared weights."""
    total, total_weight = 0.0, 0.0
    for n, (_, a) in enumerate(network(activations, params, X)):
        w = 1.0 if sample_weight is None else float(sample_weight[n])
        target = y[n].tolist()
        total += w * LOSSES[loss](a, target)
        total_weight += w
    C = total / (len(X) if reduction == "mean" else total_weight)
    for W, _ in params:
        for row in W:
            for w in row:
                C += 0.5 * l2 * float(w) ** 2
    return C


def rows(f, *arrays):
    """f of every row, as a list."""
    return [f(*(v.tolist() for v in row)) for row in zip(*arrays, strict=True)]


def of_activation(name):
    return partial(rows, ACTIVATIONS[name])


def of_loss(name):
    return partial(rows, LOSSES[name])


def of_gate(name):
    """An entrywise gate with single numbers expanded to the other's shape; a whole one as it is."""
    if name in WHOLE:
        return WHOLE[name]

    def value(*xs):
        shape = max((x.shape for x in xs), key=len)
        entries = (x.ravel().tolist() * (math.prod(shape) if not x.shape else 1) for x in xs)
        flat = iter([ENTRYWISE[name](*numbers) for numbers in zip(*entries, strict=True)])
        return _nested(flat, shape)

    return value


def _nested(flat, shape):
    return [_nested(flat, shape[1:]) for _ in range(shape[0])] if shape else next(flat)
