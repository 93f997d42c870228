"""Bad input: what a user does wrong, the error, and what it says; and right input next to it, accepted.

The shape annotations are off, so the library's own messages are met. They say what was expected, what came
and what to do. Values (NaN, labels out of range) are `fnn.fit`'s to check; shapes and dtypes everyone's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse

import fnn as package

fnn: Any = package  # without types: wrong ones are the point

pytestmark = pytest.mark.usefixtures("no_shape_annotations", "standard_promotion")

N, K = 6, 3  # constants of NumPy: importing this file starts no device, so mutmut can fork after it
X = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)
y = np.array([0, 1, 2, 0, 1, 2])
P = np.eye(K, dtype=np.float32)[y]  # one-hot
T = np.ones((N, K), np.float32)  # targets of a regression
w = np.ones(N, np.float32)


def key() -> jax.Array:
    return jax.random.key(0)


def layers(*widths: int) -> Any:
    """Parameters without compiling anything, in float32."""
    shapes = zip(widths[1:], widths[:-1], strict=True)
    Ws = [np.random.default_rng(1).standard_normal(shape) / shape[1] ** 0.5 for shape in shapes]
    return tuple(fnn.Layer(W.astype("float32"), (0 * W[:, 0]).astype("float32")) for W in Ws)


PARAMS = layers(4, 5, K)
SINGLE = layers(4, 5, 1)  # one output
OTHER = layers(7, 5, K)
FIRST, LAST = PARAMS
NET = fnn.mlp(fnn.tanh)
LINEAR = fnn.mlp([])
CLASSES = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels)
PROBABILITIES = fnn.cost(NET, fnn.softmax_cross_entropy)
CATEGORICAL = fnn.cost(fnn.mlp(fnn.tanh, output=fnn.softmax), fnn.categorical_cross_entropy)
BINARY_LOGITS = fnn.cost(NET, fnn.sigmoid_binary_cross_entropy)
BINARY = fnn.cost(fnn.mlp(fnn.tanh, output=fnn.sigmoid), fnn.binary_cross_entropy)
SQUARES = fnn.cost(NET, fnn.half_squared_error)
SGD = optax.sgd(0.1)
OF_NAN, OF_STRING = optax.sgd(np.nan), optax.sgd(cast(Any, "0.1"))
FLOAT_LOSSES = {
    "half_squared_error": fnn.half_squared_error,
    "squared_error": fnn.squared_error,
    "mean_squared_error": fnn.mean_squared_error,
    "mean_absolute_error": fnn.mean_absolute_error,
    "huber_loss": fnn.huber_loss(1.0),
    "softmax_cross_entropy": fnn.softmax_cross_entropy,
    "sigmoid_binary_cross_entropy": fnn.sigmoid_binary_cross_entropy,
    "categorical_cross_entropy": fnn.categorical_cross_entropy,
    "binary_cross_entropy": fnn.binary_cross_entropy,
}


def fit(cost: Any = CLASSES, optimizer: Any = SGD, params: Any = PARAMS, data: Any = (X, y), **options: Any):
    options = {"key": key(), "epochs": 1, "batch_size": 3, "progress": False} | options
    return fnn.fit(cost, optimizer, params, data, **options)


def without_x64(call: Callable[[], Any]) -> Any:
    with jax.enable_x64(False):
        return call()


def changed(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def of_dtype(dtype: Any, params: Any = PARAMS) -> Any:
    return jax.tree.map(lambda a: np.asarray(a).astype(dtype), params)


def state() -> Any:
    return fnn.train_state(SGD, PARAMS, key())


class Frame:
    """A table: a shape and a conversion, but no dtype, as pandas.DataFrame."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return self.values


class Series(Frame):
    """A column: a dtype too, but indexed by labels, as pandas.Series."""

    @property
    def dtype(self):
        return self.values.dtype

    def __getitem__(self, label):
        raise KeyError(label)


@dataclass
class Unhashable:
    """A dataclass that is not frozen has no hash."""

    forward: Any = CLASSES.forward
    pullback: Any = CLASSES.pullback

    def __call__(self, params, X, y):
        return jnp.float32(0)


# Rules that their author got wrong, each in one place.
OF_MEAN = fnn.Rule(lambda Z, y: (jnp.mean((Z - y) ** 2), Z - y), lambda e, C_bar: (2 * C_bar * e, None))
OF_ALL = fnn.Rule(lambda Z, y: ((Z - y) ** 2, Z - y), lambda e, C_bar: (2 * C_bar * e, None))
NO_RESIDUALS = fnn.Rule(lambda x: x**2, lambda residuals, y_bar: (y_bar,))
NO_TUPLE = fnn.Rule(lambda x: (jnp.sum(x**2), x), lambda x, y_bar: 2 * y_bar * x)
NO_LABELS = fnn.Rule(lambda Z, y: (jnp.sum(Z - y, axis=-1), Z), lambda Z, C_bar: C_bar[:, None] + 0 * Z)
NO_WEIGHTS = fnn.Rule(lambda params, X, y: (jnp.sum(X), None), lambda residuals, C_bar: (None,) * 3)
# Right ones of a user's: a network of one matrix, and a cost of one number.
AFFINE = fnn.Rule(lambda W, X: (X @ W, (W, X)), lambda r, A_bar: (r[1].T @ A_bar, A_bar @ r[0].T))
OF_NUMBERS = fnn.Rule(
    lambda a, x, y: (jnp.mean((a * x - y) ** 2), (a * x - y, x)),
    lambda residuals, C_bar: (2 * C_bar * jnp.mean(residuals[0] * residuals[1]), None, None),
)


class Bad(NamedTuple):
    call: Callable[[], Any]
    error: type[Exception]
    message: str  # a regular expression


# Two lines for a row, of which the formatter would make six.
# fmt: off
BAD = {
    # The network's inputs
    "X of the wrong width": Bad(lambda: NET(PARAMS, X[:, :3]), ValueError,
        r"mlp: X needs shape \(N, 4\).*got \(6, 3\).*another network"),
    "one example of the wrong width": Bad(lambda: NET(PARAMS, X[0, :3]), ValueError,
        r"or \(4,\) for a single example.*got \(3,\): are params of another network"),
    "X transposed": Bad(lambda: NET(PARAMS, X.T), ValueError, r"needs shape \(N, 4\).*got \(4, 6\).*X\.T"),
    "X of images": Bad(lambda: NET(PARAMS, X[:, None]), ValueError,
        r"needs shape \(N, 4\).*got \(6, 1, 4\).*reshape\(len\(X\), -1"),
    "X a number": Bad(lambda: NET(PARAMS, jnp.float32(1)), ValueError, r"needs shape \(N, 4\).*got \(\)"),
    "X a column of numbers without its axis": Bad(
        lambda: LINEAR((fnn.Layer(w[:, None]),), w), ValueError,
        r"needs shape \(N, 1\).*got \(6,\).*X\.reshape\(-1, 1\)"),
    "X a row of numbers for a column": Bad(lambda: LINEAR((fnn.Layer(w[:, None]),), w[None]), ValueError,
        r"needs shape \(N, 1\).*got \(1, 6\): .*X\.T"),
    "X of integers": Bad(lambda: NET(PARAMS, X.astype(int)), TypeError,
        r"same dtype, got X int64 and params float32.*X\.astype\(float32"),
    "X of objects": Bad(lambda: NET(PARAMS, X.astype(object)), TypeError, r"got X object and params float32"),
    "X of strings": Bad(lambda: NET(PARAMS, X.astype(str)), TypeError, r"got X <U\d+ and params float32"),
    "X a list": Bad(lambda: NET(PARAMS, X.tolist()), TypeError,
        r"X needs to be an array \(N, 4\), got list; use jnp\.asarray"),
    "X None": Bad(lambda: NET(PARAMS, None), TypeError, r"X needs to be an array \(N, 4\), got NoneType"),
    "X a table": Bad(lambda: CLASSES(PARAMS, Frame(X), y), TypeError, r"X needs to be an array.*got Frame"),
    "X a column of a table": Bad(lambda: CLASSES(PARAMS, Series(X), y), TypeError,
        r"X needs to be an array.*got Series; use jnp\.asarray"),
    "X sparse": Bad(lambda: NET(PARAMS, scipy.sparse.csr_array(X)), TypeError,
        r"X needs to be an array.*got csr_array"),
    "X masked": Bad(lambda: NET(PARAMS, np.ma.masked_array(X, X > 1)), TypeError,
        r"X needs to be an array.*got MaskedArray"),
    "X float64, params float32": Bad(lambda: NET(PARAMS, X.astype(np.float64)), TypeError,
        r"got X float64 and params float32.*X\.astype\(float32\)"),
    "X float32, params float64": Bad(lambda: NET(of_dtype("float64"), X), TypeError,
        r"got X float32 and params float64.*X\.astype\(float64\)"),
    "X and params float64, narrowed without x64": Bad(
        lambda: without_x64(lambda: NET(of_dtype("float64"), X.astype(np.float64))), TypeError,
        r"^mlp: X, as params, is float64, which JAX would narrow to float32 in silence.*jax_enable_x64"),
    "X before params": Bad(lambda: NET(X, PARAMS), TypeError,
        r"params needs to be a tuple of.*got float32 \(6, 4\)"),
    "X and y swapped": Bad(lambda: CLASSES(PARAMS, y, X), ValueError, r"X needs shape \(N, 4\).*got \(6,\)"),
    "cost without y": Bad(lambda: CLASSES(PARAMS, X), TypeError,
        r"missing 1 required positional argument: 'y'"),
    # Labels: shapes and dtypes
    "class numbers in a column": Bad(lambda: CLASSES(PARAMS, X, y[:, None]), ValueError,
        r"shape \(6,\) for z \(6, 3\); got y \(6, 1\).*y\[\.\.\., 0\]"),
    "one-hot labels for an integer loss": Bad(lambda: CLASSES(PARAMS, X, P), TypeError,
        r"class numbers; got float32 \(6, 3\).*use fnn\.softmax_cross_entropy"),
    "one-hot labels of integers for an integer loss": Bad(
        lambda: CLASSES(PARAMS, X, P.astype(int)), ValueError,
        r"got y \(6, 3\).*y\.argmax\(axis=-1\), if y is one-hot"),
    "class numbers in a column, for sequences": Bad(
        lambda: fnn.softmax_cross_entropy_with_integer_labels(T.reshape(2, 3, K), y.reshape(2, 3, 1)),
        ValueError,
        r"shape \(2, 3\) for z \(2, 3, 3\); got y \(2, 3, 1\)\. Did you mean y\["),
    "class numbers as floats": Bad(lambda: CLASSES(PARAMS, X, y.astype(np.float32)), TypeError,
        r"integers, class numbers; got float32 \(6,\).*y\.astype\(int\)"),
    "class numbers as booleans": Bad(lambda: CLASSES(PARAMS, X, y > 0), TypeError,
        r"integers, class numbers; got bool \(6,\)"),
    "class numbers as objects": Bad(lambda: CLASSES(PARAMS, X, y.astype(object)), TypeError,
        r"integers, class numbers; got object \(6,\)"),
    "class numbers as a list": Bad(lambda: CLASSES(PARAMS, X, y.tolist()), TypeError,
        r"y needs to be an array, got list; use jnp\.asarray"),
    "class numbers as a column of a table": Bad(lambda: CLASSES(PARAMS, X, Series(y)), TypeError,
        r"y needs to be an array, got Series; use jnp\.asarray"),
    "too few class numbers": Bad(lambda: CLASSES(PARAMS, X, y[:4]), ValueError,
        r"got y \(4,\)\. Are X and y of the same examples"),
    "one row of X, six class numbers": Bad(lambda: CLASSES(PARAMS, X[:1], y), ValueError,
        r"shape \(1,\) for z \(1, 3\); got y \(6,\).*same examples"),
    "one row of X, six rows of targets": Bad(lambda: SQUARES(PARAMS, X[:1], T), ValueError,
        r"got z \(1, 3\) and y \(6, 3\).*same examples"),
    "one row of targets for six": Bad(lambda: SQUARES(PARAMS, X, T[:1]), ValueError,
        r"got z \(6, 3\) and y \(1, 3\).*same examples"),
    "targets transposed": Bad(lambda: SQUARES(PARAMS, X, T.T), ValueError,
        r"got z \(6, 3\) and y \(3, 6\).*y\.T"),
    "a column of targets for three outputs": Bad(lambda: SQUARES(PARAMS, X, T[:, :1]), ValueError,
        r"got z \(6, 3\) and y \(6, 1\)\. Broadcasting would"),
    "one target for three outputs": Bad(lambda: SQUARES(PARAMS, X, T[:, 0]), ValueError,
        r"got z \(6, 3\) and y \(6,\).*a last width of 1"),
    "one target for three outputs, of a single example": Bad(
        lambda: fnn.squared_error(T[0], T[0, 0]), ValueError,
        r"got z \(3,\) and y \(\)\..*a last width of 1"),
    "one target for three outputs, for sequences": Bad(
        lambda: fnn.squared_error(T.reshape(2, 3, K), T[:2]), ValueError,
        r"got z \(2, 3, 3\) and y \(2, 3\)\..*a last width of 1"),
    "targets with an axis too many": Bad(lambda: fnn.squared_error(T, T[..., None]), ValueError,
        r"got z \(6, 3\) and y \(6, 3, 1\)\. Did you mean.*or an output for each target"),
    "a number as target": Bad(lambda: SQUARES(PARAMS, X, 0.0), TypeError,
        r"y needs to be an array, got float; use jnp\.asarray"),
    "class numbers for a loss on probabilities": Bad(lambda: PROBABILITIES(PARAMS, X, y), ValueError,
        r"got z \(6, 3\) and y \(6,\)\. For class numbers use.*_with_integer_labels, or.*one_hot\(y, 3\)"),
    "class numbers as floats for a loss on probabilities": Bad(
        lambda: PROBABILITIES(PARAMS, X, y.astype(np.float32)), ValueError,
        r"For class numbers use.*one_hot\(y, 3\)"),
    "class numbers as floats after softmax": Bad(
        lambda: CATEGORICAL(PARAMS, X, y.astype(np.float32)), ValueError,
        r"For class numbers use.*one_hot\(y, 3\), with categorical_cross_entropy\."),
    "class numbers of two classes for a loss on probabilities": Bad(
        lambda: PROBABILITIES(layers(4, 5, 2), X, y), ValueError,
        r"got z \(6, 2\) and y \(6,\)\. For class numbers use.*one_hot\(y, 2\)"),
    "class numbers for a regression": Bad(lambda: SQUARES(PARAMS, X, y), ValueError,
        r"For class numbers use.*one_hot\(y, 3\), with half_squared_error\."),
    "one-hot labels of integers for a float loss": Bad(
        lambda: PROBABILITIES(PARAMS, X, P.astype(int)), TypeError,
        r"y needs to be floats as z, float32, got int64; use y\.astype\(z\.dtype\)"),
    "integer targets": Bad(lambda: SQUARES(PARAMS, X, T.astype(np.int32)), TypeError,
        r"needs to be floats as z, float32, got int32"),
    "boolean targets": Bad(lambda: BINARY(PARAMS, X, T > 0), TypeError,
        r"y needs to be floats as z, float32, got bool; use y\.astype"),
    "float64 targets without x64": Bad(
        lambda: without_x64(lambda: SQUARES(PARAMS, X, T.astype(np.float64))), TypeError,
        r"got z float32 and y float64"),
    "outputs as a list": Bad(lambda: fnn.squared_error([1.0], [1.0]), TypeError,
        r"^squared_error: z needs to be a float array, got list; use jnp\.asarray"),
    "outputs of integers": Bad(lambda: fnn.squared_error(y, y), TypeError,
        r"z needs to be a float array, got int64; use jnp\.asarray"),
    "outputs of integers for an integer loss": Bad(
        lambda: fnn.softmax_cross_entropy_with_integer_labels(P.astype(int), y), TypeError,
        r"^softmax_cross_entropy_with_integer_labels: z needs to be a float array, got int64"),
    "a single output as a number": Bad(lambda: fnn.squared_error(jnp.float32(1), jnp.float32(1)), ValueError,
        r"z needs shape \(N, K\).*got \(\)"),
    "no outputs": Bad(lambda: fnn.squared_error(T[:, :0], T[:, :0]), ValueError, r"with K ≥ 1; got \(6, 0\)"),
    # Labels: values, at fit's door
    "class number -1": Bad(lambda: fit(data=(X, changed(y, 2, -1))), ValueError,
        r"need to lie in 0\.\.2.*got -1 at index 2.*from 0"),
    "class number K": Bad(lambda: fit(data=(X, changed(y, 4, K))), ValueError,
        r"need to lie in 0\.\.2.*got 3 at index 4 \(1 of 6"),
    "class number that int32 cannot hold": Bad(
        lambda: without_x64(lambda: fit(data=(X, y + 2**32))), TypeError,
        r"int64 with numbers that do not fit int32"),
    "probabilities that sum to two": Bad(lambda: fit(PROBABILITIES, data=(X, 2 * P)), ValueError,
        r"sum to 1; got 2\.0 at index \(0, 0\).*Divide every row"),
    "one-hot labels of integers that sum to two": Bad(
        lambda: fnn.check_labels(fnn.softmax_cross_entropy, 2 * P.astype(int), K), ValueError,
        r"sum to 1; got 2 at index \(0, 0\)"),
    "a row without probability": Bad(lambda: fit(PROBABILITIES, data=(X, changed(P, 3, 0))), ValueError,
        r"got 0\.0 at index \(3, 0\) \(3 of 18"),
    "a negative probability": Bad(
        lambda: fit(PROBABILITIES, data=(X, changed(P, 1, (1.5, -0.5, 0)))), ValueError,
        r"at least 0.*got -0\.5"),
    "probabilities that sum to two, after softmax": Bad(lambda: fit(CATEGORICAL, data=(X, 2 * P)), ValueError,
        r"categorical_cross_entropy: labels are probabilities"),
    "labels -1 and 1 for two classes": Bad(lambda: fit(BINARY_LOGITS, data=(X, 2 * P - 1)), ValueError,
        r"in \[0, 1\]; got -1\.0.*\(y \+ 1\) / 2"),
    "a probability above 1": Bad(lambda: fit(BINARY, data=(X, 1.5 * P)), ValueError,
        r"binary_cross_entropy.*in \[0, 1\]; got 1\.5"),
    "softmax of a single output": Bad(lambda: fit(params=SINGLE, data=(X, 0 * y)), ValueError,
        r"two outputs or more, got 1.*use fnn\.sigmoid_binary"),
    "softmax of a single output, probabilities": Bad(
        lambda: fit(PROBABILITIES, params=SINGLE, data=(X, w[:, None])), ValueError,
        r"two outputs or more, got 1"),
    "check_labels of a list": Bad(
        lambda: fnn.check_labels(fnn.softmax_cross_entropy_with_integer_labels, [0, 3], K), ValueError,
        r"got 3 at index 1"),
    # NaN and inf, at fit's door
    "NaN in X": Bad(lambda: fit(data=(changed(X, (1, 2), np.nan), y)), ValueError,
        r"X of data needs to be finite, got nan at index \(1, 2\) \(1 of 24 values.*Remove or replace"),
    "inf in X": Bad(lambda: fit(data=(changed(X, 0, np.inf), y)), ValueError,
        r"X of data.*got inf at index \(0, 0\)"),
    "NaN in y": Bad(lambda: fit(SQUARES, data=(X, T * np.nan)), ValueError,
        r"y of data needs to be finite, got nan"),
    "inf in sample_weight": Bad(lambda: fit(data=(X, y, changed(w, 0, np.inf))), ValueError,
        r"sample_weight of data needs to be finite"),
    "NaN in validation": Bad(lambda: fit(validation=(X * np.nan, y)), ValueError,
        r"X of validation needs to be finite, got nan"),
    "NaN in params": Bad(lambda: fit(params=(FIRST, LAST._replace(b=LAST.b * np.nan))), ValueError,
        r"params\[1\]\.b needs to be finite"),
    "inf in params": Bad(lambda: fit(params=(FIRST._replace(W=FIRST.W * np.inf), LAST)), ValueError,
        r"params\[0\]\.W needs to be finite, got"),
    "NaN in bfloat16": Bad(
        lambda: fit(params=of_dtype(jnp.bfloat16), data=((X * np.nan).astype(jnp.bfloat16), y)), ValueError,
        r"X of data needs to be finite, got nan"),
    # Activations and mlp
    "a factory not called": Bad(lambda: fnn.mlp(fnn.leaky_relu), TypeError,
        r"an activation needs to be a rule.*got the function leaky_relu.*call it"),
    "JAX's relu": Bad(lambda: fnn.mlp(jax.nn.relu), TypeError,
        r"needs to be a rule.*such as fnn\.relu.*fnn\.Rule\(forward, pullback\)"),
    "the name of an activation": Bad(lambda: fnn.mlp("relu"), TypeError,
        r"activation needs to be a rule.*got 'relu'"),
    "an activation None": Bad(lambda: fnn.mlp(None), TypeError,
        r"an activation needs to be a rule.*got None"),
    "the class Network as activation": Bad(lambda: fnn.mlp(fnn.Network), TypeError,
        r"needs to be a rule.*got the function Network"),
    "a generator of activations": Bad(lambda: fnn.mlp(rule for rule in [fnn.relu]), TypeError,
        r"needs to be a rule.*got <generator"),
    "a loss as activation": Bad(lambda: fnn.mlp(fnn.squared_error), TypeError,
        r"called with \(z\), such as fnn\.relu.*got squared_error"),
    "a network as activation": Bad(lambda: fnn.mlp(NET), TypeError,
        r"called with \(z\), such as fnn\.relu.*got Network.*takes other arguments"),
    "the name of an output activation": Bad(lambda: fnn.mlp(fnn.relu, output="softmax"), TypeError,
        r"^mlp: the output activation needs to be a rule.*such as fnn\.softmax; got 'softmax'"),
    "a loss as output activation": Bad(lambda: fnn.mlp(fnn.relu, output=fnn.squared_error), TypeError,
        r"^mlp: the output activation.* called with \(z\), such as fnn\.softmax; got squared_error"),
    "too many activations": Bad(lambda: fnn.mlp([fnn.relu] * 2)(PARAMS, X), ValueError,
        r"1 hidden layers, but mlp was given 2.*output="),
    "too few activations": Bad(lambda: LINEAR(PARAMS, X), ValueError,
        r"1 hidden layers, but mlp was given 0"),
    "leaky_relu of a string": Bad(lambda: fnn.leaky_relu("a"), ValueError,
        r"^leaky_relu: slope needs to be a finite number such as 0\.01, got 'a'"),
    "leaky_relu of a number in a string": Bad(lambda: fnn.leaky_relu("0.1"), ValueError,
        r"finite number.*got '0\.1'"),
    "leaky_relu of an array": Bad(lambda: fnn.leaky_relu(X), ValueError,
        r"^leaky_relu: slope needs to be a number, got an array \(6, 4\)\. fnn\.leaky_relu\(0\.01\) makes"),
    "leaky_relu of a traced number": Bad(
        lambda: jax.jit(lambda slope: fnn.leaky_relu(slope)(X))(0.1), ValueError,
        r"finite number such as 0\.01, got"),
    "elu of NaN": Bad(lambda: fnn.elu(float("nan")), ValueError,
        r"elu: alpha needs to be a finite number.*got nan"),
    "elu of inf": Bad(lambda: fnn.elu(float("inf")), ValueError,
        r"^elu: alpha needs to be a finite number.*got inf"),
    "elu of True": Bad(lambda: fnn.elu(True), ValueError,
        r"elu: alpha needs to be a finite number.*got True"),
    "huber_loss of 0": Bad(lambda: fnn.huber_loss(0), ValueError,
        r"huber_loss: delta needs to be positive, got 0"),
    "huber_loss of outputs": Bad(lambda: fnn.huber_loss(T), ValueError,
        r"^huber_loss: delta needs.*got an array \(6, 3\)\. fnn\.huber_loss\(0\.01\) makes the rule"),
    "huber_loss of a number beyond float64": Bad(lambda: fnn.huber_loss(10**400), ValueError,
        r"^huber_loss: delta needs to be a finite number"),
    # Parameters
    "params of another network": Bad(lambda: NET(OTHER, X), ValueError,
        r"X needs shape \(N, 7\).*got \(6, 4\): are params of another network"),
    "params a dict": Bad(lambda: NET({"W": FIRST.W}, X), TypeError,
        r"needs to be a tuple of fnn\.Layer\(W, b\), as fnn\.init.*got dict"),
    "params a list of pairs": Bad(lambda: NET([tuple(layer) for layer in PARAMS], X), TypeError,
        r"got list\. Convert pairs with tuple\(fnn\.Layer"),
    "params a tuple of pairs": Bad(lambda: NET(tuple(tuple(layer) for layer in PARAMS), X), TypeError,
        r"got tuple\. Convert pairs with"),
    "params a list of layers": Bad(lambda: NET(list(PARAMS), X), TypeError,
        r"a tuple of fnn\.Layer.*got list"),
    "params a single layer": Bad(lambda: NET(FIRST, X), TypeError,
        r"got Layer\. A single layer is the tuple \(layer,\)"),
    "params an empty tuple": Bad(lambda: NET((), X), TypeError,
        r"needs to be a tuple of fnn\.Layer.*got \(\)"),
    "params None": Bad(lambda: NET(None, X), TypeError, r"needs to be a tuple of fnn\.Layer.*got None"),
    "params a table": Bad(lambda: NET(Frame(X), X), TypeError,
        r"^mlp: params needs to be a tuple of fnn\.Layer.*got Frame"),
    "layers in reverse": Bad(lambda: NET(PARAMS[::-1], X), ValueError,
        r"W of layer 2 needs 3 columns, the width of layer 1, got \(5, 4\)"),
    "W of layer 1 transposed": Bad(lambda: NET((FIRST._replace(W=FIRST.W.T), LAST), X), ValueError,
        r"b of layer 1.*\(4,\).*got float32 \(5,\).*transposed"),
    "W of layer 2 transposed, without biases": Bad(lambda: NET((FIRST, fnn.Layer(LAST.W.T)), X), ValueError,
        r"W of layer 2 needs 5 columns.*is it transposed"),
    "params of two dtypes": Bad(
        lambda: NET((FIRST, LAST._replace(W=LAST.W.astype(jnp.bfloat16))), X), TypeError,
        r"need one dtype; W of layer 1 is float32, W of layer 2 bfloat16.*astype"),
    "b of another dtype": Bad(lambda: NET((FIRST._replace(b=np.zeros(5)), LAST), X), TypeError,
        r"need one dtype.*b of layer 1 float64"),
    "b of the wrong length": Bad(lambda: NET((FIRST._replace(b=w), LAST), X), ValueError,
        r"b of layer 1 needs to be an array of shape \(5,\).*\(6,\)"),
    "b a column": Bad(lambda: NET((FIRST._replace(b=FIRST.b[:, None]), LAST), X), ValueError,
        r"shape \(5,\).*got float32 \(5, 1\)"),
    "b a number": Bad(lambda: NET((FIRST._replace(b=0.0), LAST), X), ValueError,
        r"shape \(5,\).*got 0\.0\..*without bias has b=None"),
    "W a list": Bad(lambda: NET((fnn.Layer(X.tolist()),), X), TypeError,
        r"W of layer 1 needs to be a float array, got list; use"),
    "W of integers": Bad(lambda: NET((fnn.Layer(X.astype(int)),), X), TypeError,
        r"W of layer 1 needs to be a float array, got int64 \(6, 4\)"),
    "W of a single output without its axis": Bad(lambda: LINEAR((fnn.Layer(X[0]),), X), ValueError,
        r"shape \(n_out, n_in\), got \(4,\).*\(1, n_in\)"),
    "params of many networks": Bad(lambda: NET(jax.tree.map(lambda a: a[None], PARAMS), X), ValueError,
        r"got \(1, 5, 4\).*through jax\.vmap"),
    "W without rows": Bad(lambda: LINEAR((fnn.Layer(X[:0]),), X), ValueError,
        r"W of layer 1 is empty, \(0, 4\); widths need to be at least 1"),
    "summary of a network": Bad(lambda: fnn.summary(NET), TypeError, r"summary: params needs.*got Network"),
    # init
    "sizes (5,)": Bad(lambda: fnn.init(key(), (5,)), ValueError,
        r"sizes needs the widths of.*such as \(64, 128, 10\); got \(5,\)"),
    "sizes a string": Bad(lambda: fnn.init(key(), "64"), ValueError, r"sizes needs the widths of.*got '64'"),
    "sizes bytes": Bad(lambda: fnn.init(key(), b"64"), ValueError, r"sizes needs the widths of.*got b'64'"),
    "sizes a number": Bad(lambda: fnn.init(key(), 64), ValueError, r"sizes needs the widths of.*got 64"),
    "a width of 0": Bad(lambda: fnn.init(key(), (3, 0)), ValueError,
        r"hold positive integers, got 0 in \(3, 0\)"),
    "a width of 2.5": Bad(lambda: fnn.init(key(), (3, 2.5)), ValueError,
        r"hold positive integers, got 2\.5 in"),
    "a width of -1": Bad(lambda: fnn.init(key(), (3, -1)), ValueError, r"hold positive integers, got -1 in"),
    "a width of True": Bad(lambda: fnn.init(key(), (3, True)), ValueError,
        r"hold positive integers, got True in"),
    "a width an array": Bad(lambda: fnn.init(key(), (3, np.array([4, 5]))), ValueError,
        r"hold positive integers, got array\(\[4, 5\]\)"),
    "init dtype int": Bad(lambda: fnn.init(key(), (3, 2), dtype=int), TypeError,
        r"dtype needs to be a float dtype.*got int64"),
    "init dtype of eight bits": Bad(lambda: fnn.init(key(), (3, 2), dtype=jnp.float8_e4m3fn), TypeError,
        r"of 16 to 64 bits.*got float8_e4m3fn"),
    "init dtype no dtype": Bad(lambda: fnn.init(key(), (3, 2), dtype="floot32"), TypeError,
        r"one such as jnp\.float32, got 'floot32'"),
    "init dtype float64 without x64": Bad(
        lambda: without_x64(lambda: fnn.init(key(), (3, 2), dtype="float64")), TypeError,
        r"float64 needs 64-bit JAX: call"),
    "init key an int": Bad(lambda: fnn.init(0, (3, 2)), TypeError,
        r"^init: key needs to be one PRNG key of JAX, got 0; make one with jax\.random\.key"),
    "init key a large seed": Bad(lambda: fnn.init(2**32, (3, 2)), TypeError,
        r"one PRNG key of JAX, got 4294967296"),
    "init key many": Bad(lambda: fnn.init(jax.random.split(key(), 3), (3, 2)), TypeError,
        r"one PRNG key.*\(3,\); of many keys, take one"),
    "init key of the wrong length": Bad(lambda: fnn.init(jnp.zeros(3, jnp.uint32), (3, 2)), TypeError,
        r"one PRNG key of JAX, got uint32 \(3,\)"),
    "init key NumPy's generator": Bad(lambda: fnn.init(np.random.default_rng(0), (3, 2)), TypeError,
        r"one PRNG key of JAX, got Generator"),
    "an initialiser's factory": Bad(
        lambda: fnn.init(key(), (3, 2), weights=jax.nn.initializers.he_normal), TypeError,
        r"initialiser of W of layer 1 returned no array.*are made by a call, such as he_normal\("),
    "an initialiser's factory with other arguments": Bad(
        lambda: fnn.init(key(), (3, 2), weights=jax.nn.initializers.normal), TypeError,
        r"initialiser of W of layer 1, shape \(2, 3\), failed.*needs to be a function \(key, shape, dtype\)"),
    "jnp.zeros as initialiser": Bad(lambda: fnn.init(key(), (3, 2), bias=jnp.zeros), TypeError,
        r"initialiser of b of layer 1.*failed.*use fnn\.zeros"),
    "an initialiser of the wrong shape": Bad(
        lambda: fnn.init(key(), (3, 2), weights=lambda key, shape, _: jnp.zeros(shape[::-1])), ValueError,
        r"W of layer 1 needs to return shape \(2, 3\) and dtype float64, got \(3, 2\)"),
    "an initialiser of the wrong dtype": Bad(
        lambda: fnn.init(key(), (3, 2), weights=lambda key, shape, _: np.zeros(shape, "float32")), ValueError,
        r"W of layer 1 needs to return.*float64, got \(2, 3\) and float32"),
    "an initialiser that counts inputs, for the bias": Bad(
        lambda: fnn.init(key(), (3, 2), bias=fnn.he_normal), ValueError,
        r"initialiser of b of layer 1, shape \(2,\).*fnn\.zeros"),
    "weights a number": Bad(lambda: fnn.init(key(), (3, 2), weights=0.1), TypeError,
        r"weights needs a function \(key, shape, dtype\).*got 0\.1"),
    "bias False": Bad(lambda: fnn.init(key(), (3, 2), bias=False), TypeError,
        r"bias needs a function.*got False"),
    # cost
    "l2 negative": Bad(lambda: fnn.cost(NET, fnn.squared_error, l2=-1), ValueError,
        r"l2 needs to be a finite number, at least 0.*got -1"),
    "l2 NaN": Bad(lambda: fnn.cost(NET, fnn.squared_error, l2=np.nan), ValueError,
        r"l2 needs to be a finite.*got nan"),
    "l2 inf": Bad(lambda: fnn.cost(NET, fnn.squared_error, l2=np.inf), ValueError,
        r"l2 needs to be a finite.*got inf"),
    "l2 a string": Bad(lambda: fnn.cost(NET, fnn.squared_error, l2="0.1"), ValueError,
        r"l2 needs to be a finite number.*got '0\.1'"),
    "l2 of every layer": Bad(lambda: fnn.cost(NET, fnn.squared_error, l2=jnp.array([0.1, 0.2])), ValueError,
        r"l2 needs to be a finite number"),
    "l2 a negative array": Bad(lambda: fnn.cost(NET, fnn.squared_error, l2=jnp.float32(-1)), ValueError,
        r"at least 0.*got Array\(-1"),
    "l2 a traced vector": Bad(
        lambda: jax.jit(lambda l2: fnn.cost(NET, fnn.squared_error, l2=l2)(PARAMS, X, T))(w), ValueError,
        r"l2 needs to be a"),
    "reduction sum": Bad(lambda: fnn.cost(NET, fnn.squared_error, reduction="sum"), ValueError,
        r'"mean" or "weighted_mean", got \'sum\''),
    "a loss not made": Bad(lambda: fnn.cost(NET, fnn.huber_loss), TypeError,
        r"^cost: the loss.*such as fnn\.squared_error or fnn\.huber_loss\(1\.0\); got the function"),
    "the name of a loss": Bad(lambda: fnn.cost(NET, "mse"), TypeError, r"loss needs to be a rule.*got 'mse'"),
    "an activation as loss": Bad(lambda: fnn.cost(NET, fnn.relu), TypeError,
        r"the loss needs to be a rule called with \(a, y\).*got relu"),
    "network and loss swapped": Bad(lambda: fnn.cost(fnn.squared_error, NET), TypeError,
        r"network comes first, then the loss.*got Network.*as the loss"),
    "mlp as network": Bad(lambda: fnn.cost(fnn.mlp, fnn.squared_error), TypeError,
        r"^cost: the network needs to be a rule.*such as fnn\.mlp\(fnn\.relu\); got the function mlp"),
    "an activation as network": Bad(lambda: fnn.cost(fnn.relu, fnn.squared_error), TypeError,
        r"network needs to be a rule called with \(params, X\)"),
    "a penalty without layers": Bad(
        lambda: fnn.cost(AFFINE, fnn.squared_error, l2=0.1)(X.T @ T, X, T), TypeError,
        r"^cost: a penalty l2 reads W\^l of every layer, so: params needs to be a tuple"),
    "a loss that takes the mean itself": Bad(lambda: fnn.cost(NET, OF_MEAN)(PARAMS, X, T), ValueError,
        r"one number per example, shape \(6,\).*returned \(\)"),
    "a loss for every output": Bad(lambda: fnn.cost(NET, OF_ALL)(PARAMS, X, T), ValueError,
        r"one number per example, shape \(6,\).*returned \(6, 3\)"),
    "a loss without an adjoint of y, for two examples": Bad(
        lambda: fnn.value_and_grad(fnn.cost(NET, NO_LABELS))(PARAMS, X[:2], T[:2]), TypeError,
        r"pullback needs to return a tuple with one adjoint for each argument.*got"),
    "an empty batch": Bad(lambda: CLASSES(PARAMS, X[:0], y[:0]), ValueError,
        r"batch is empty, X \(0, 4\); it needs at least"),
    # Sample weights
    "sample_weight a column": Bad(lambda: CLASSES(PARAMS, X, y, w[:, None]), ValueError,
        r"one weight per example, shape \(6,\); got \(6, 1\)"),
    "sample_weight too short": Bad(lambda: CLASSES(PARAMS, X, y, w[:3]), ValueError,
        r"shape \(6,\); got \(3,\)"),
    "sample_weight a number": Bad(lambda: CLASSES(PARAMS, X, y, 2.0), ValueError, r"shape \(6,\); got float"),
    "sample_weight a list": Bad(lambda: CLASSES(PARAMS, X, y, w.tolist()), ValueError,
        r"shape \(6,\); got list"),
    "sample_weight of integers": Bad(lambda: CLASSES(PARAMS, X, y, w.astype(int)), TypeError,
        r"losses' dtype float32, got int64; use sample_weight\.astype"),
    "sample_weight float64": Bad(
        lambda: without_x64(lambda: fit(data=(X, y, w.astype(np.float64)))), TypeError,
        r"sample_weight of data is float64"),
    "sample_weight negative": Bad(lambda: fit(data=(X, y, changed(w, 0, -1))), ValueError,
        r"at least 0, and not 0 for every example; got.*-1\.0"),
    "sample_weight all zero": Bad(lambda: fit(data=(X, y, 0 * w)), ValueError,
        r"not 0 for every example; got numbers from 0\.0 to 0\.0"),
    "sample_weight None in data": Bad(lambda: fit(data=(X, y, None)), TypeError,
        r"sample_weight of data needs to be an array, got NoneType; leave it out"),
    "weights of classes": Bad(lambda: fit(data=(X, y, {0: 1.0, 1: 2.0, 2: 1.0})), TypeError,
        r"sample_weight of data needs to be an array, got dict"),
    # fit: counts, key, options
    "batch_size above N": Bad(lambda: fit(batch_size=7), ValueError,
        r"batch_size 7 is larger than the data, N = 6; for full batches use batch_size=6"),
    "batch_size 0": Bad(lambda: fit(batch_size=0), ValueError,
        r"batch_size needs to be a positive integer, got 0"),
    "batch_size -1": Bad(lambda: fit(batch_size=-1), ValueError, r"positive integer, got -1"),
    "batch_size 2.5": Bad(lambda: fit(batch_size=2.5), ValueError, r"positive integer, got 2\.5"),
    "batch_size True": Bad(lambda: fit(batch_size=True), ValueError, r"positive integer, got True"),
    "batch_size an array": Bad(lambda: fit(batch_size=np.array([3])), ValueError,
        r"positive integer, got array\(\[3\]\)"),
    "epochs 0": Bad(lambda: fit(epochs=0), ValueError, r"epochs needs to be a positive integer, got 0"),
    "epochs -1": Bad(lambda: fit(epochs=-1), ValueError, r"epochs needs to be a positive integer, got -1"),
    "epochs 10.0": Bad(lambda: fit(epochs=10.0), ValueError,
        r"epochs needs to be a positive integer, got 10\.0"),
    "epochs an array": Bad(lambda: fit(epochs=np.array([1, 2])), ValueError,
        r"epochs needs to be a positive integer"),
    "key missing": Bad(lambda: fnn.fit(CLASSES, SGD, PARAMS, (X, y), epochs=1, batch_size=3), TypeError,
        r"missing 1 required keyword-only argument: 'key'"),
    "key None": Bad(lambda: fit(key=None), TypeError,
        r"fit: key needs to be one PRNG key of JAX, got None; make one"),
    "key an int": Bad(lambda: fit(key=0), TypeError,
        r"fit: key needs to be one PRNG key of JAX, got 0; make one"),
    "key many": Bad(lambda: fit(key=jax.random.split(key())), TypeError,
        r"one PRNG key.*\(2,\); of many keys, take one"),
    "an unknown option": Bad(lambda: fit(shuffle=True), TypeError, r"unexpected keyword argument 'shuffle'"),
    "fit inside jit": Bad(lambda: jax.jit(lambda params: fit(params=params).params)(PARAMS), TypeError,
        r"fit: needs arrays with values, got traced ones.*outside jit.*use fnn\.train_step"),
    "fit inside vmap": Bad(lambda: jax.vmap(lambda w: fit(data=(X, y, w)).params)(T.T), TypeError,
        r"got traced ones.*outside jit, vmap, grad.*fnn\.train_epoch"),
    # fit: optimizer and cost
    "an optimiser not made": Bad(lambda: fit(optimizer=optax.adam), TypeError,
        r"needs to be one of optax, call it: optax\.adam\(learning_rate\); got"),
    "optimizer None": Bad(lambda: fit(optimizer=None), TypeError,
        r"one of optax, such as optax\.adam\(1e-3\); got None"),
    "optimizer a learning rate": Bad(lambda: fit(optimizer=0.1), TypeError,
        r"one of optax, such as.*got 0\.1"),
    "optimizer a schedule": Bad(lambda: fit(optimizer=optax.constant_schedule(0.1)), TypeError,
        r"one of optax, such as optax\.adam\(1e-3\)"),
    "optimizer and params swapped": Bad(lambda: fit(optimizer=PARAMS, params=SGD), TypeError,
        r"optimizer needs to be one of optax.*got tuple"),
    "cost a function": Bad(lambda: fit(lambda params, X, y: 0.0), TypeError,
        r"fit: cost needs to be a rule.*fnn\.cost\(net, loss\); got the function"),
    "cost a network": Bad(lambda: fit(NET), TypeError,
        r"called with \(params, X, y\), such as fnn\.cost\(net, loss\); got Network"),
    "cost a loss": Bad(lambda: fit(fnn.squared_error), TypeError,
        r"called with \(params, X, y\).*got squared_error"),
    "cost that takes no weights": Bad(
        lambda: fit(NO_WEIGHTS, data=(X, y, w)), TypeError,
        r"called with \(params, X, y, sample_weight\)"),
    "cost without a hash": Bad(lambda: fit(Unhashable()), TypeError,
        r"cost needs to be hashable.*Make a dataclass.*frozen"),
    # fit: params
    "fit of other params": Bad(lambda: fit(params=OTHER), ValueError,
        r"X needs shape \(N, 7\).*another network"),
    "fit of params a list": Bad(lambda: fit(params=list(PARAMS)), TypeError,
        r"a tuple of fnn\.Layer.*got list"),
    "fit of no params": Bad(lambda: fit(params=()), TypeError,
        r"params holds no arrays, got \(\); make them with fnn\.init"),
    "fit of sizes": Bad(lambda: fit(params=(4, 5, 3)), TypeError,
        r"params\[0\] needs to be an array, got 4; make params"),
    "fit of a history": Bad(lambda: fit(params=fnn.History(PARAMS, {}, {}, w)), TypeError,
        r"needs to be an array, got History.*history\.params"),
    "fit of a training state": Bad(lambda: fit(params=state()), TypeError,
        r"params\.key needs to hold real numbers"),
    "fit of float64 params, narrowed": Bad(
        lambda: without_x64(lambda: fit(params=of_dtype("float64"))), TypeError,
        r"params\[0\]\.W is float64.*narrow to float32"),
    # fit: data
    "data an array": Bad(lambda: fit(data=X), TypeError,
        r"data needs to be \(X, y\) or \(X, y, sample_weight\), got ndarray"),
    "data a dict": Bad(lambda: fit(data={"X": X, "y": y}), TypeError, r"data needs to be \(X, y\).*got dict"),
    "data of X alone": Bad(lambda: fit(data=(X,)), TypeError, r"data needs to be \(X, y\).*got 1 of them"),
    "data of four": Bad(lambda: fit(data=(X, y, w, w)), TypeError,
        r"data needs to be \(X, y\).*got 4 of them"),
    "data a list of examples": Bad(lambda: fit(data=list(zip(X, y, strict=True))), TypeError,
        r"got 6 of them"),
    "data a loader": Bad(lambda: fit(data=iter([(X, y)])), TypeError,
        r"needs to be \(X, y\).*got list_iterator"),
    "X and y as two arguments": Bad(
        lambda: fnn.fit(CLASSES, SGD, PARAMS, X, y, key=key(), epochs=1, batch_size=3), TypeError,
        r"positional arguments"),
    "data with X a list": Bad(lambda: fit(data=(X.tolist(), y)), TypeError,
        r"X of data.*array, got list; use numpy\.asarray"),
    "data with y None": Bad(lambda: fit(data=(X, None)), TypeError,
        r"y of data needs to be an array, got NoneType"),
    "data with X a table": Bad(lambda: fit(data=(Frame(X), y)), TypeError,
        r"X of data.*got Frame; use numpy\.asarray"),
    "data with X sparse": Bad(lambda: fit(data=(scipy.sparse.csr_array(X), y)), TypeError,
        r"X of data.*got csr_array; use.*\.toarray\(\)"),
    "data with X masked": Bad(lambda: fit(data=(np.ma.masked_array(X, X > 1), y)), TypeError,
        r"X of data is a masked array; fill it"),
    "data with X of objects": Bad(lambda: fit(data=(X.astype(object), y)), TypeError,
        r"X of data needs to hold real numbers, got dtype object.*astype"),
    "data with X ragged": Bad(lambda: fit(data=(np.array([X[0], X[1, :2]] * 3, object), y)), TypeError,
        r"dtype object\. Numbers of rows of one length"),
    "data with X of strings": Bad(lambda: fit(data=(X.astype(str), y)), TypeError,
        r"X of data needs to hold real numbers, got dtype <U"),
    "data with names of classes": Bad(lambda: fit(data=(X, np.array(list("abcabc")))), TypeError,
        r"y of data.*dtype <U1.*numpy\.unique\(y, return_inverse"),
    "data with complex numbers": Bad(lambda: fit(data=(X + 1j, y)), TypeError,
        r"real numbers, got dtype complex"),
    "data with keys": Bad(lambda: fit(data=(jax.random.split(key(), N), y)), TypeError,
        r"real numbers, got PRNG keys"),
    "data in another byte order": Bad(lambda: fit(data=(X.astype(">f4"), y)), TypeError,
        r"X of data has dtype >f4, which JAX does not know.*astype"),
    "data float64, narrowed": Bad(lambda: without_x64(lambda: fit(data=(X.astype(np.float64), y))), TypeError,
        r'X of data is float64, which JAX would narrow to float32 in silence\. Use \.astype\("float32"\)'),
    "targets float64, narrowed": Bad(
        lambda: without_x64(lambda: fit(SQUARES, data=(X, T.astype(np.float64)))), TypeError,
        r"y of data is float64, which JAX would narrow"),
    "data float64, params float32": Bad(lambda: fit(data=(X.astype(np.float64), y)), TypeError,
        r"got X float64 and params float32"),
    "data of bytes": Bad(lambda: fit(data=(X.astype(np.uint8), y)), TypeError,
        r"got X uint8 and params float32.*X\.astype"),
    "data empty": Bad(lambda: fit(data=(X[:0], y[:0])), ValueError,
        r"data is empty, X \(0, 4\); it needs at least one"),
    "data transposed": Bad(lambda: fit(data=(X.T, y)), ValueError,
        r"one row per example, got \[4, 6\] rows.*transposed"),
    "data of the wrong width": Bad(lambda: fit(data=(X[:, :3], y)), ValueError,
        r"X needs shape \(N, 4\).*got \(6, 3\)"),
    "data one row, six labels": Bad(lambda: fit(data=(X[:1], y)), ValueError,
        r"one row per example, got \[1, 6\] rows"),
    "data one example": Bad(lambda: fit(data=(X[0], y[0])), ValueError,
        r"y of data needs examples along its first axis"),
    "data of one number for each example": Bad(
        lambda: fit(fnn.cost(LINEAR, fnn.squared_error), params=(fnn.Layer(P[:K]),), data=(T[0], T[0])),
        ValueError,
        r"X of data needs shape \(N, n_0\), examples as rows; got \(3,\).*X\[:, None\]"),
    "validation of the wrong width": Bad(lambda: fit(validation=(X[:, :3], y)), ValueError,
        r"(?s)X needs shape \(N, 4\).*got \(6, 3\).*about the validation"),
    "validation empty": Bad(lambda: fit(validation=(X[:0], y[:0])), ValueError,
        r"validation is empty, X \(0, 4\)"),
    "validation of X alone": Bad(lambda: fit(validation=X), TypeError,
        r"validation needs to be \(X, y\).*got ndarray"),
    "validation a fraction": Bad(lambda: fit(validation=0.2), TypeError,
        r"validation needs to be \(X, y\).*got float"),
    "validation with an unknown class": Bad(lambda: fit(validation=(X, y + 1)), ValueError,
        r"(?s)0\.\.2.*got 3 at index 2.*about the validation given to fit"),
    # fit: metrics
    "metrics a function": Bad(lambda: fit(metrics=fnn.accuracy(NET)), TypeError,
        r"metrics needs to be a dict of name -> function \(params, X, y\)"),
    "metrics a list of names": Bad(lambda: fit(metrics=["accuracy"]), TypeError,
        r"metrics needs to be a dict.*\['accuracy'"),
    "a metric by name": Bad(lambda: fit(metrics={"accuracy": "accuracy"}), TypeError,
        r"metrics needs to be a dict"),
    "a metric not made": Bad(lambda: fit(metrics={"a": fnn.accuracy}), TypeError,
        r"metric 'a' needs to be a function \(params, X, y\).*fnn\.accuracy\(net\)"),
    "a metric of (X, y)": Bad(lambda: fit(metrics={"a": lambda X, y: 0.0}), TypeError,
        r"metric 'a'.*takes other arguments"),
    "a metric named cost": Bad(lambda: fit(metrics={"cost": fnn.accuracy(NET)}), ValueError,
        r'the name "cost" is taken by the cost itself; give'),
    "a metric named by a number": Bad(lambda: fit(metrics={1: fnn.accuracy(NET)}), TypeError,
        r"a metric's name needs to be a string, got 1; use '1'"),
    "a metric that returns a vector": Bad(lambda: fit(metrics={"a": lambda params, X, y: X[:, 0]}), TypeError,
        r"metric 'a' needs to be a scalar, got shape \(6,\)"),
    "a metric that returns nothing": Bad(lambda: fit(metrics={"a": lambda params, X, y: None}), TypeError,
        r"metric 'a' needs to be a scalar, got None; return"),
    "a metric that returns two numbers": Bad(
        lambda: fit(metrics={"a": lambda params, X, y: (0.0, 1.0)}), TypeError,
        r"needs to be a scalar, got tuple"),
    "a metric that returns a complex number": Bad(
        lambda: fit(metrics={"a": lambda params, X, y: jnp.complex64(1j)}), TypeError,
        r"metric 'a' needs to be real"),
    "a metric without a hash": Bad(lambda: fit(metrics={"a": Unhashable()}), TypeError,
        r"metric 'a' needs to be hashable.*frozen"),
    "a metric of another network": Bad(lambda: fit(metrics={"a": fnn.accuracy(LINEAR)}), ValueError,
        r"1 hidden layers, but mlp was given 0"),
    "accuracy of a single output": Bad(lambda: fnn.accuracy(NET)(SINGLE, X, 0 * y), ValueError,
        r"needs two outputs or more.*got outputs \(6, 1\)"),
    "accuracy of labels in a column": Bad(lambda: fnn.accuracy(NET)(PARAMS, X, y[:, None]), ValueError,
        r"class numbers \(N,\).*y int64 \(6, 1\).*y\[:, 0\]"),
    "accuracy of float class numbers": Bad(
        lambda: fnn.accuracy(NET)(PARAMS, X, y.astype(np.float32)), ValueError,
        r"y float32 \(6,\).*y\.astype\(int\)"),
    "accuracy of probabilities of fewer classes": Bad(
        lambda: fnn.accuracy(NET)(PARAMS, X, P[:, :2]), ValueError,
        r"probabilities \(N, K\); got outputs \(6, 3\).*\(6, 2\)"),
    "accuracy of nothing": Bad(lambda: fnn.accuracy(NET)(PARAMS, X[:0], y[:0]), ValueError,
        r"got outputs \(0, 3\)"),
    "accuracy of a cost": Bad(lambda: fnn.accuracy(CLASSES), TypeError,
        r"the network needs to be a rule called with \(params, X\)"),
    "accuracy called at once": Bad(lambda: fnn.accuracy(PARAMS, X, y), TypeError,
        r"takes 1 positional argument but 3"),
    "early stopping a number": Bad(lambda: fit(early_stopping=5), TypeError,
        r"early_stopping needs to be made by fnn\.EarlyStopping\(patience=10\), got 5"),
    "early stopping by a metric that is not there": Bad(
        lambda: fit(early_stopping=fnn.EarlyStopping("accuracy")), ValueError,
        r"monitors 'accuracy', but the numbers of this run are 'cost'; give it as one of metrics"),
    "early stopping without patience": Bad(
        lambda: fit(early_stopping=fnn.EarlyStopping(patience=0)), ValueError,
        r"patience of early_stopping needs to be a positive integer, got 0"),
    "early stopping with a gain below 0": Bad(
        lambda: fit(early_stopping=fnn.EarlyStopping(min_delta=-1)), ValueError,
        r"min_delta of early_stopping needs to be a finite number, at least 0; got -1"),
    "callbacks a function": Bad(lambda: fit(callbacks=print), TypeError,
        r"callbacks needs to be a list of functions of a report, such as \[print\]; got"),
    "a callback without arguments": Bad(lambda: fit(callbacks=[lambda: None]), TypeError,
        r"a callback needs to be a function of one argument, the report"),
    "divergence ignored": Bad(lambda: fit(on_divergence="ignore"), ValueError,
        r"on_divergence needs to be \"raise\" or \"skip\", got 'ignore'"),
    "record a function": Bad(lambda: fit(record=fnn.example_norms), TypeError,
        r"record needs to be a dict of name -> function of a sweep.*\{\"norms\": fnn\.example_norms\}; got"),
    "record not hashable": Bad(lambda: fit(record={"own": Unhashable()}), TypeError,
        r"the function 'own' of record needs to be hashable"),
    "record of numbers for each example, with a short last batch": Bad(
        lambda: fit(record={"norms": fnn.example_norms}, batch_size=4), ValueError,
        r"'norms' of record needs to return equal shapes.*one batch has 2 examples, another 4"),
    "record with a cost that has no sweep": Bad(
        lambda: fit(OF_NUMBERS, params=np.float32(1), data=(w, w), record={"norms": fnn.example_norms}),
        TypeError, r"backprop: cost needs to be made by fnn\.cost"),
    # Rules
    "value_and_grad of a vector": Bad(lambda: fnn.value_and_grad(fnn.squared_error)(T, T), TypeError,
        r"needs to return a scalar, got shape \(6,\)\. Make a cost"),
    "value_and_grad of a function": Bad(lambda: fnn.value_and_grad(jnp.sum), TypeError,
        r"the function needs to be a rule.*such as fnn\.squared_error; got.*fnn\.Rule\(forward, pullback\)"),
    "value_and_grad of integers": Bad(lambda: fnn.value_and_grad(fnn.relu)(2), TypeError,
        r"relu needs to return a float, got int64; pass floats"),
    "argnums beyond the last argument": Bad(lambda: fnn.value_and_grad(CLASSES, 3)(PARAMS, X, y), ValueError,
        r"argnums=3, but.*has 3 arguments; they are counted"),
    "argnums before the first": Bad(lambda: fnn.value_and_grad(CLASSES, (0, -4))(PARAMS, X, y), ValueError,
        r"argnums=-4, but.*has 3 arguments"),
    "argnums of the labels": Bad(lambda: fnn.value_and_grad(CLASSES, 2)(PARAMS, X, y), TypeError,
        r"argument 2 of.*has no gradient: it holds integers"),
    "argnums a float": Bad(lambda: fnn.value_and_grad(CLASSES, 1.0), TypeError,
        r"argnums needs to be the number of an argument.*got 1\.0"),
    "argnums a name": Bad(lambda: fnn.value_and_grad(CLASSES, "params"), TypeError,
        r"argnums needs to be.*got 'params'"),
    "as_custom_vjp of a function": Bad(lambda: fnn.as_custom_vjp(jnp.tanh), TypeError,
        r"as_custom_vjp: the rule needs to be a rule.*got the function tanh"),
    "Rule of a number": Bad(lambda: fnn.Rule(lambda x: (x, None), 3), TypeError,
        r"Rule: pullback needs to be a function, got 3"),
    "Rule without a pullback": Bad(lambda: fnn.Rule(lambda x: (x, None)), TypeError,
        r"missing 1.*argument: 'pullback'"),
    "a forward that keeps nothing": Bad(lambda: NO_RESIDUALS(T), TypeError,
        r"forward needs to return a pair \(out, residuals\), got ndarray; return \(out, None\)"),
    "the gradient of a forward that keeps nothing": Bad(
        lambda: fnn.value_and_grad(NO_RESIDUALS)(jnp.float32(2)), TypeError,
        r"needs to return a pair.*return \(out, None\)"),
    "a forward that keeps nothing, for jax.grad": Bad(lambda: fnn.as_custom_vjp(NO_RESIDUALS)(T), TypeError,
        r"forward needs to return a pair \(out, residuals\)"),
    "a pullback that returns a bare array": Bad(lambda: fnn.value_and_grad(NO_TUPLE)(w), TypeError,
        r"pullback needs to return a tuple.*return \(x_bar,\)"),
    # The sweep and single steps
    "backprop of a loss": Bad(lambda: fnn.backprop(fnn.squared_error, PARAMS, X, T), TypeError,
        r"made by fnn\.cost.*got squared_error\. For any other"),
    "backprop of a cost of another rule": Bad(
        lambda: fnn.backprop(fnn.cost(AFFINE, fnn.squared_error), X.T @ T, X, T), TypeError,
        r"of a network made by fnn\.mlp"),
    "feedback a list of matrices": Bad(
        lambda: fnn.backprop(CLASSES, PARAMS, X, y, feedback=[W for W, _ in PARAMS]), TypeError,
        r"feedback needs to be parameters of the same network.*direct_feedback\(key, params\).*got list"),
    "feedback a transpose": Bad(
        lambda: fnn.backprop(CLASSES, PARAMS, X, y, feedback=(FIRST, fnn.Layer(LAST.W.T))), ValueError,
        r"matrix of layer 2 needs to be float32 \(3, 5\), got float32 \(5, 3\).*not of its transpose"),
    "feedback without the first layer": Bad(
        lambda: fnn.backprop(CLASSES, PARAMS, X, y, feedback=(LAST,)), ValueError,
        r"feedback needs 1 matrices to lead back through 2 layers, got 0"),
    "feedback of another dtype": Bad(
        lambda: fnn.backprop(CLASSES, PARAMS, X, y, feedback=of_dtype("float16")), ValueError,
        r"matrix of layer 2 needs to be float32 \(3, 5\), got float16"),
    "direct feedback of another network": Bad(
        lambda: fnn.backprop(CLASSES, PARAMS, X, y, feedback=fnn.direct_feedback(key(), SINGLE)), ValueError,
        r"matrix of layer 1 needs to be float32 \(3, 5\), got float32 \(1, 5\).*fnn\.direct_feedback"),
    "direct feedback of a seed": Bad(lambda: fnn.direct_feedback(0, PARAMS), TypeError,
        r"direct_feedback: key needs to be one PRNG key"),
    "direct feedback of sizes": Bad(lambda: fnn.direct_feedback(key(), (4, 5, 3)), TypeError,
        r"direct_feedback: params needs to be a tuple of fnn\.Layer"),
    "statistics of a cost": Bad(lambda: fnn.layer_statistics(CLASSES), TypeError,
        r"layer_statistics: needs a sweep"),
    "statistics with edges that fall": Bad(
        lambda: fnn.layer_statistics(fnn.backprop(CLASSES, PARAMS, X, y), (0.9, 0.5)), ValueError,
        r"edges needs to be finite numbers that rise, such as \(0\.5, 0\.99\); got \(0\.9, 0\.5\)"),
    "statistics with one edge for a list": Bad(
        lambda: fnn.layer_statistics(fnn.backprop(CLASSES, PARAMS, X, y), 0.5), ValueError,
        r"edges needs to be finite numbers that rise"),
    "gradient of a cost": Bad(lambda: fnn.gradient(CLASSES), TypeError,
        r"needs a sweep, as fnn\.backprop makes, got Cost.*fnn\.value_and_grad\(cost\)"),
    "train_state of an optimiser not made": Bad(lambda: fnn.train_state(optax.adam, PARAMS, key()), TypeError,
        r"train_state: optimizer.*call it: optax\.adam\("),
    "train_state with a seed": Bad(lambda: fnn.train_state(SGD, PARAMS, 0), TypeError,
        r"train_state: key needs to be one"),
    "train_state of float64, narrowed": Bad(
        lambda: without_x64(lambda: fnn.train_state(SGD, of_dtype("float64"), key())), TypeError,
        r"params\[0\]\.W is float64"),
    "train_step of params": Bad(lambda: fnn.train_step(CLASSES, SGD, PARAMS, X, y), TypeError,
        r"state needs to be a TrainState, as fnn\.train_state"),
    "train_epoch with too few labels": Bad(
        lambda: fnn.train_epoch(CLASSES, SGD, state(), (X, y[:3]), 3), ValueError,
        r"one row for each example.*got.*\[6, 3\] rows"),
    "train_epoch of nothing": Bad(
        lambda: fnn.train_epoch(CLASSES, SGD, state(), (X[:0], y[:0]), 3), ValueError,
        r"at least one; got.*\[0, 0\] rows"),
    "train_epoch of X alone": Bad(lambda: fnn.train_epoch(CLASSES, SGD, state(), X, 3), ValueError,
        r"data needs to be arrays \(X, y\).*got float32 \(6, 4\)"),
    "train_epoch with batch_size above N": Bad(
        lambda: fnn.train_epoch(CLASSES, SGD, state(), (X, y), 7), ValueError,
        r"batch_size 7 is larger than the data, N = 6"),
    "train_epoch with batch_size 0": Bad(
        lambda: fnn.train_epoch(CLASSES, SGD, state(), (X, y), 0), ValueError,
        r"batch_size needs to be a positive integer, got 0"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_message_that_helps(name):
    case = BAD[name]
    with pytest.raises(case.error) as caught:
        case.call()
    assert caught.type is case.error
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search(case.message, message), message
    assert len(message) < 500, "arrays are named by shape and dtype, not printed"


GOOD: dict[str, Callable[[], Any]] = {
    "NumPy arrays": lambda: fit(data=(X, y)),
    "JAX arrays in a list": lambda: fit(data=[jnp.asarray(X), jnp.asarray(y)]),
    "a column of a table": lambda: fit(data=(X, Series(y))),
    "int64 labels of NumPy without x64": lambda: without_x64(lambda: fit(data=(X, y))),
    "int64 labels of NumPy without x64, for the cost": lambda: without_x64(lambda: CLASSES(PARAMS, X, y)),
    "uint32 labels without x64": lambda: without_x64(lambda: CLASSES(PARAMS, X, jnp.asarray(y, "uint32"))),
    "uint8 labels": lambda: fit(data=(X, y.astype(np.uint8))),
    "a label of NumPy's for one example": lambda: CLASSES(PARAMS, X[0], y[0]),
    "labels at 0 and at K-1 only": lambda: fit(data=(X, (K - 1) * (y > 0))),
    "one-hot labels": lambda: fnn.check_labels(fnn.softmax_cross_entropy, P, K),
    "probabilities rounded to bfloat16": lambda: fnn.check_labels(
        fnn.softmax_cross_entropy, np.full((N, K), 1 / 3, jnp.bfloat16), K
    ),
    "probabilities of a hundred classes, rounded to bfloat16": lambda: fnn.check_labels(
        fnn.softmax_cross_entropy, np.full((N, 100), 1 / 100, jnp.bfloat16), 100
    ),
    "probabilities of one example": lambda: fnn.check_labels(fnn.softmax_cross_entropy, P[0], K),
    "two outputs for two classes, after softmax": lambda: fnn.check_labels(
        fnn.categorical_cross_entropy, P[:2, :2], 2
    ),
    "one-hot labels of integers": lambda: fnn.check_labels(fnn.softmax_cross_entropy, P.astype(int), K),
    "probabilities 0 and 1 for two classes": lambda: fnn.check_labels(fnn.binary_cross_entropy, P, K),
    "a single output for two classes": lambda: fnn.check_labels(
        fnn.sigmoid_binary_cross_entropy, P[:, :1], 1
    ),
    "bfloat16 parameters": lambda: fit(params=of_dtype(jnp.bfloat16), data=(X.astype(jnp.bfloat16), y)),
    "float64 with x64": lambda: CLASSES(of_dtype("float64"), X.astype(np.float64), y),
    "parameters of NumPy": lambda: fit(params=of_dtype("float32")),
    "no biases": lambda: NET(tuple(fnn.Layer(layer.W) for layer in PARAMS), X),
    "a typed key": lambda: fit(key=jax.random.key(1)),
    "a raw key": lambda: fit(key=jax.random.PRNGKey(1)),
    "a raw key of NumPy": lambda: fit(key=np.array([0, 1], np.uint32)),
    "a raw key for init": lambda: fnn.init(jax.random.PRNGKey(0), (4, 5, 3), weights=fnn.zeros),
    "keys under vmap": lambda: jax.vmap(lambda key: fnn.init(key, (3, 2), weights=fnn.zeros))(
        jax.random.split(key(), 3)
    ),
    "batch_size and epochs of NumPy": lambda: fit(batch_size=np.int64(3), epochs=np.uint8(1)),
    "batch_size and epochs as arrays of one": lambda: fit(batch_size=np.array(3), epochs=jnp.array(1)),
    "batch_size N, and sample_weight with some zeros": lambda: fit(
        batch_size=N, data=(X, y, changed(w, slice(0, 4), 0))
    ),
    "validation without weights": lambda: fit(data=(X, y, w), validation=[X[:2], y[:2]]),
    "metrics of many kinds": lambda: fit(
        metrics={
            "a Python number": lambda params, X, y: 1.0,
            "with an option": partial(lambda scale, params, X, y: scale * X.sum(), 2.0),
            "another cost": CLASSES,
            "accuracy": fnn.accuracy(NET),
        }
    ),
    "no metrics": lambda: fit(metrics={}),
    "accuracy of int64 labels of NumPy without x64": lambda: without_x64(
        lambda: fnn.accuracy(NET)(PARAMS, X, y)
    ),
    "accuracy of one-hot labels": lambda: fnn.accuracy(NET)(PARAMS, X, P),
    "accuracy of one-hot booleans": lambda: fnn.accuracy(NET)(PARAMS, X, P > 0),
    "l2 an array of JAX's, in a static cost": lambda: jax.jit(
        lambda cost: cost(PARAMS, X, T), static_argnums=0
    )(fnn.cost(NET, fnn.squared_error, l2=jnp.float32(0.1))),
    "l2 a number of NumPy's": lambda: fnn.cost(NET, fnn.squared_error, l2=np.float32(0.1))(PARAMS, X, T),
    "l2 for every member": lambda: jax.vmap(lambda l2: fnn.cost(NET, fnn.squared_error, l2=l2)(PARAMS, X, T))(
        jnp.array([0.1, 0.2])
    ),
    "a slope of NumPy": lambda: fnn.leaky_relu(np.float32(0.5))(X),
    "sizes of NumPy": lambda: fnn.init(key(), [np.int64(4), np.uint8(5), 3]),
    "a range of sizes": lambda: fnn.init(key(), range(3, 6), weights=fnn.zeros),
    "dtype by name": lambda: fnn.init(key(), (3, 2), dtype="bfloat16", weights=fnn.zeros),
    "dtype as an object": lambda: fnn.init(key(), (3, 2), dtype=np.dtype("float16"), weights=fnn.zeros),
    "a rule of one's own, of one number for each example": lambda: fit(
        OF_NUMBERS, params=jnp.float32(0), data=(w, w)
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_right_input_next_to_the_bad_is_accepted(name):
    result = GOOD[name]()
    arrays = jax.tree.leaves(result.params if isinstance(result, fnn.History) else result)
    assert all(bool(jnp.isfinite(array).all()) for array in arrays)


def test_accuracy_does_not_take_answer_256_for_label_0_of_a_byte():
    answers = np.eye(300, dtype=np.float32)[[256, 44]]
    params = (fnn.Layer(np.eye(300, dtype=np.float32)),)
    assert fnn.accuracy(LINEAR)(params, answers, np.array([0, 44], np.uint8)) == 0.5


def test_learning_rate_nan_is_named_as_the_suspect():
    with pytest.raises(
        fnn.DivergenceError, match=r"in epoch 1 the cost became nan at step 2 of 2.*learning rate"
    ) as caught:
        fit(optimizer=OF_NAN)
    history = caught.value.history
    assert len(history.seconds) == 0 and not any(len(numbers) for numbers in history.train.values())
    assert_same_params(history.params, PARAMS)


def test_diverging_run_keeps_its_history():
    with pytest.raises(
        fnn.DivergenceError, match=r"Try a smaller learning rate.*\.history has the"
    ) as caught:
        fit(SQUARES, optax.sgd(30.0), data=(X, T), epochs=100, batch_size=N)
    history = caught.value.history
    assert 1 < len(history.seconds) == len(history.train["cost"]) < 100
    assert np.isfinite(history.train["cost"]).all() and history.train["cost"][-1] > history.train["cost"][0]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(history.params))


def test_network_that_gives_no_probabilities_diverges_before_the_first_update():
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.categorical_cross_entropy)
    with pytest.raises(fnn.DivergenceError, match="Nothing was updated yet.*a loss on probabilities"):
        fit(cost, data=(X, P), batch_size=N)


@pytest.mark.parametrize(
    "call",
    [
        lambda params: fit(params=params, data=(X, y + 1)),
        lambda params: fit(params=params, batch_size=7),
        lambda params: fit(params=params, metrics={"a": lambda params, X, y: X}),
        lambda params: fit(optimizer=OF_NAN, params=params),
        lambda params: fit(optimizer=OF_STRING, params=params),  # fails inside, while it is compiled
    ],
    ids=["labels", "batch_size", "metric", "learning rate NaN", "learning rate a string"],
)
def test_failed_fit_leaves_the_callers_params_usable_and_unchanged(call):
    params = jax.tree.map(jnp.array, PARAMS)
    with pytest.raises((ValueError, TypeError, fnn.DivergenceError)):
        call(params)
    assert_same_params(params, PARAMS)
    assert_same_params(fit(params=params).params, fit().params)


@pytest.mark.parametrize("loss", FLOAT_LOSSES)
def test_float_losses_refuse_targets_that_would_broadcast(loss):
    rule, column = FLOAT_LOSSES[loss], T[:, :1]
    with pytest.raises(
        ValueError, match=rf"^{loss}: .*got z \(6, 1\) and y \(6,\)\. Did you mean y\[\.\.\., None\]"
    ):
        rule(column, column[:, 0])
    with pytest.raises(
        ValueError, match=rf"^{loss}: .*got z \(6,\) and y \(6, 1\)\. Did you mean y\[\.\.\., 0\]"
    ):
        rule(column[:, 0], column)
    with pytest.raises(
        TypeError, match=rf"^{loss}: y needs to be floats as z, float32, got int64; use y.astype"
    ):
        rule(T, T.astype(int))


def assert_same_params(got: Any, want: Any):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
