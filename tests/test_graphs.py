"""Computational graphs: the lecture's numbers, gradients added at forks, and whatever Python can write."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fnn as package

fnn: Any = package  # without types: wrong ones are tried too
Node, gates, node = fnn.Node, fnn.gates, fnn.node

# The lecture's graphs: function of nodes, inputs, and every intermediate value and gradient by name.


def product_of_sum(x, y, z):
    return ((x + y).named("q") * z).named("f")


def sigmoid_neuron(w0, x0, w1, x1, w2):
    z = ((w0 * x0).named("w0x0") + (w1 * x1).named("w1x1")).named("wx") + w2
    e = node(gates.exp, node(gates.scale(-1.0), z.named("z"), name="-z"), name="exp")
    return node(gates.reciprocal, (e + 1).named("1+exp"), name="f")


def twice(x, y, z, w):
    return (2 * (x * y + node(gates.maximum, z, w))).named("f")


def squared_length(W, x):
    return node(gates.squared_norm, (W @ x).named("q"), name="f")


def ratio(x, y):
    numerator = x + node(fnn.sigmoid, y)
    return numerator / (node(fnn.sigmoid, x) + (x + y) ** 2)


E1 = float(np.exp(-1))
S = 1 / (1 + E1)  # σ(1)


@pytest.mark.parametrize(
    "function, inputs, values, gradients",
    (
        # CS231n, lecture 4
        (product_of_sum, (-2.0, 5.0, -4.0), {"q": 3, "f": -12}, {"x": -4, "y": -4, "z": 3, "q": -4, "f": 1}),
        (
            sigmoid_neuron,
            (2.0, -1.0, -3.0, -2.0, -3.0),
            {"w0x0": -2, "w1x1": 6, "wx": 4, "z": 1, "-z": -1, "exp": E1, "1+exp": 1 + E1, "f": S},
            {"f": 1, "1+exp": -S * S, "exp": -S * S, "-z": -S * S * E1, "z": S * (1 - S), "wx": S * (1 - S)}
            | {"w0x0": S * (1 - S), "w1x1": S * (1 - S), "w2": S * (1 - S)}
            | dict(zip(("w0", "x0", "w1", "x1"), np.array([-1, 2, -2, -3]) * S * (1 - S), strict=True)),
        ),
        (twice, (3.0, -4.0, 2.0, -1.0), {"f": -20}, {"x": -8, "y": 6, "z": 2, "w": 0}),
        (
            squared_length,
            (np.array([[0.1, 0.5], [-0.3, 0.8]]), np.array([0.2, 0.4])),
            {"q": [0.22, 0.26], "f": 0.116},
            {"q": [0.44, 0.52], "W": [[0.088, 0.176], [0.104, 0.208]], "x": [-0.112, 0.636]},
        ),
    ),
)  # fmt: skip
def test_lectures_graph_has_the_lectures_numbers(function, inputs, values, gradients):
    sweep = fnn.graph(function).backprop(*inputs)
    for name, expected in values.items():
        np.testing.assert_allclose(sweep.values[name], expected, rtol=1e-14, err_msg=name)
    for name, expected in gradients.items():
        np.testing.assert_allclose(sweep.gradients[name], expected, rtol=1e-14, err_msg=name)


def test_ratio_of_the_lecture_has_the_gradient_of_the_quotient_rule():
    x, y = 3.0, -4.0
    sx, sy = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(-y))
    numerator, denominator = x + sy, sx + (x + y) ** 2
    dx = 1 / denominator - numerator / denominator**2 * (sx * (1 - sx) + 2 * (x + y))
    dy = sy * (1 - sy) / denominator - numerator / denominator**2 * 2 * (x + y)
    value, (x_bar, y_bar) = fnn.value_and_grad(fnn.graph(ratio), argnums=(0, 1))(x, y)
    np.testing.assert_allclose([value, x_bar, y_bar], [numerator / denominator, dx, dy], rtol=1e-14)


def test_gates_grouped_into_one_give_the_same_numbers():
    """The sigmoid gate is the lecture's four gates; a graph may be a gate too."""
    inputs = (2.0, -1.0, -3.0, -2.0, -3.0)
    apart = fnn.graph(sigmoid_neuron).backprop(*inputs)
    four = fnn.graph(lambda z: 1 / (node(gates.exp, -z) + 1))
    for gate in (fnn.sigmoid, four):
        grouped = fnn.graph(lambda w0, x0, w1, x1, w2: node(gate, w0 * x0 + w1 * x1 + w2, name="f"))
        sweep = grouped.backprop(*inputs)
        for name in (*grouped.inputs, "f"):
            np.testing.assert_allclose(sweep.gradients[name], apart.gradients[name], rtol=1e-14)
        np.testing.assert_allclose(sweep.values["f"], apart.values["f"], rtol=1e-14)


def test_gradients_are_added_at_forks():
    def many(x):
        return x * x + x * 3 + node(gates.exp, x) - x / x  # six wires leave x

    value, slope = fnn.value_and_grad(fnn.graph(many))(0.5)
    np.testing.assert_allclose(
        [value, slope], [0.25 + 1.5 + np.exp(0.5) - 1, 1 + 3 + np.exp(0.5)], rtol=1e-15
    )


GATES_OF_TWO = (gates.add, gates.subtract, gates.multiply, gates.maximum)
GATES_OF_ONE = (gates.sin, gates.cos, gates.square, fnn.tanh, fnn.softplus, gates.scale(-0.7), gates.shift(2))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_graph_has_the_gradient_of_jax(data):
    """Random gates on random earlier nodes, so forks, dead ends and long paths; inputs in any order."""
    names, rows = ["x", "y", "z"], []
    for n in range(data.draw(st.integers(1, 12))):
        gate = data.draw(st.sampled_from(GATES_OF_ONE + GATES_OF_TWO))
        count = 2 if gate in GATES_OF_TWO else 1
        inputs = tuple(data.draw(st.sampled_from(names)) for _ in range(count))
        rows.append(Node(f"n{n}", gate, inputs))
        names.append(f"n{n}")
    graph = fnn.Graph(("x", "y", "z"), tuple(data.draw(st.permutations(rows))), output=names[-1])
    primals = tuple(jnp.asarray(data.draw(st.floats(-2, 2))) for _ in range(3))

    def plain(*primals):
        values = dict(zip("xyz", primals, strict=True))
        for name, gate, inputs in rows:
            values[name] = gate(*(values[source] for source in inputs))
        return values[names[-1]]

    value, theirs = jax.value_and_grad(plain, argnums=(0, 1, 2))(*primals)
    sweep = graph.backprop(*primals)
    assert sweep.values[graph.output] == value
    ours = [sweep.gradients[name] for name in "xyz"]
    size = max(float(np.abs(g)) for g in (*theirs, *sweep.gradients.values()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14 * size)


def test_graph_works_under_jit_vmap_and_grad_and_on_arrays():
    graph = fnn.graph(ratio)
    x, y = jnp.linspace(-2.0, 3.0, 5), jnp.linspace(4.0, -4.0, 5)
    theirs = jax.vmap(jax.grad(lambda x, y: graph(x, y), argnums=(0, 1)))(x, y)
    batched = jax.jit(jax.vmap(graph.backprop))(x, y)
    on_arrays = graph.backprop(x, y, out_bar=jnp.ones(5))
    by_jax_grad = jax.vmap(jax.grad(fnn.as_custom_vjp(graph), argnums=(0, 1)))(x, y)
    for i, name in enumerate(("x", "y")):
        for ours in (batched.gradients[name], on_arrays.gradients[name], by_jax_grad[i]):
            np.testing.assert_allclose(ours, theirs[i], rtol=1e-12)
    np.testing.assert_array_equal(on_arrays.values["divide"], graph(x, y))
    compiled = jax.jit(lambda graph, x: graph(x, x), static_argnums=0)(graph, x)  # hashable
    np.testing.assert_allclose(compiled, graph(x, x), rtol=1e-14)


def test_inputs_may_be_given_by_name_and_whole_numbers_are_floats():
    graph = fnn.graph(product_of_sum)
    assert graph(-2, z=-4, y=5) == graph(-2.0, 5.0, -4.0) == -12
    assert graph.backprop(-2, 5, -4).gradients["z"] == 3


def test_unused_input_and_dead_end_have_gradient_zero():
    graph = fnn.Graph(("x", "y"), (Node("a", gates.exp, ("x",)), Node("b", gates.sin, ("x",))), output="b")
    sweep = graph.backprop(0.0, 2.0)
    assert sweep.gradients["y"] == sweep.gradients["a"] == 0 and sweep.gradients["x"] == 1
    assert graph.pullback(graph.forward(0.0, 2.0)[1], jnp.ones(()))[1] == 0


def test_graph_may_be_its_input():
    assert fnn.graph(lambda x: x).backprop(3.0).gradients["x"] == 1


def test_arithmetic_with_numbers_is_arithmetic():
    def everything(x):
        return (1 + x - 2) * 3 / 4 + (5 - x) * 2 + 6 / x + 1 / x - x**2 + np.float32(2) * x**3

    def on_numbers(x):
        return (1 + x - 2) * 3 / 4 + (5 - x) * 2 + 6 / x + 1 / x - x**2 + 2 * x**3

    value, slope = fnn.value_and_grad(fnn.graph(everything))(0.7)
    np.testing.assert_allclose(value, on_numbers(0.7), rtol=1e-14)
    np.testing.assert_allclose(slope, jax.grad(on_numbers)(0.7), rtol=1e-14)
    half = fnn.graph(everything)(jnp.float16(0.7))
    assert half.dtype == jnp.float16


def test_table_shows_arrays_and_does_not_fail_on_tracers():
    sweep = fnn.graph(squared_length).backprop(jnp.eye(2), jnp.array([0.5, 2.0]))
    assert "[[1, 0], [0, 1]]" in str(sweep) and "matmul(W, x)" in str(sweep)
    printed = []
    jax.jit(lambda x: printed.append(str(fnn.graph(lambda x: x + 1).backprop(x))))(1.0)
    assert "float64 ()" in printed[0]
    assert "float64 (7,)" in str(fnn.graph(lambda x: x + 1).backprop(jnp.ones(7), out_bar=jnp.ones(7)))


def test_drawing_has_values_above_the_wires_and_gradients_below(tmp_path):
    figure = fnn.draw_graph(fnn.graph(ratio).backprop(3.0, -4.0))
    for suffix in (".svg", ".png"):
        figure.savefig(tmp_path / f"graph{suffix}")
    assert "<svg" in (tmp_path / "graph.svg").read_text(encoding="utf-8")
    texts = figure.axes[0].texts
    assert len(texts) == 3 * 9  # name or symbol, value, gradient of two inputs and seven gates
    assert [t.get_text() for t in texts[:6]] == ["x", "3", "2.06", "y", "-4", "1.592"]
    for name, value, gradient in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        assert value.get_position()[1] > name.get_position()[1] > gradient.get_position()[1]
        assert value.get_color() != gradient.get_color()
    figure.draw_without_rendering()
    box = figure.bbox
    for text in texts:  # inside the picture, and no number on another
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1
    extents = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


ROWS = (Node("q", gates.add, ("x", "y")), Node("f", gates.multiply, ("q", "x")))


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: fnn.Graph(("x",), (Node("a", gates.exp, ("b",)), Node("b", gates.add, ("a", "x")))), ValueError, r"a -> b -> a is a cycle|b -> a -> b is a cycle"),
        (lambda: fnn.Graph(("x",), (Node("a", gates.exp, ("a",)),)), ValueError, "a -> a is a cycle"),
        (lambda: fnn.Graph(("x",), ROWS), ValueError, "node 'q' takes 'y', but there is no such node; there are x"),
        (lambda: fnn.Graph(("x", "y", "q"), ROWS), ValueError, "'q' is used twice"),
        (lambda: fnn.Graph(("x", "x"), ROWS), ValueError, "'x' is used twice"),
        (lambda: fnn.Graph(("x", "y"), (*ROWS, ROWS[0])), ValueError, "'q' is used twice"),
        (lambda: fnn.Graph(("x", "y"), ROWS, output="g"), ValueError, "output is 'g', but there is no such node"),
        (lambda: fnn.Graph(("x", "y", "z"), (*ROWS, Node("g", gates.exp, ("x",)))), ValueError, "Nothing uses f, g; name one: output='f'"),
        (lambda: fnn.Graph("xy", ROWS), TypeError, "inputs needs to be a tuple of names"),
        (lambda: fnn.Graph(("x", "y"), (("q", gates.add, ("x", "y")),)), TypeError, "needs rows Node"),
        (lambda: fnn.Graph(("x", "y"), (Node("q", gates.add, "xy"),)), TypeError, "needs rows Node"),
        (lambda: fnn.Graph(("x", "y"), (Node("q", jnp.add, ("x", "y")),)), TypeError, "gate of node 'q' needs to be a rule"),
        (lambda: fnn.Graph(("x", "y"), (Node("q", gates.add, ("x",)),)), ValueError, "'q' gives 1 inputs to add"),
        (lambda: fnn.Graph(("x",), (Node("q", fnn.graph(ratio), ("x",)),)), ValueError, "takes 2"),
        (lambda: fnn.Graph(("x", "y"), ROWS)(1.0), TypeError, r"needs the inputs \(x, y\), got 1"),
        (lambda: fnn.Graph(("x", "y"), ROWS)(1.0, z=2.0), TypeError, "got 2, with z by name"),
        (lambda: fnn.Graph(("x", "y"), ROWS)(1.0, x=2.0), TypeError, "got 2, with x by name"),
        (lambda: fnn.Graph(("x", "y"), ROWS)(1.0, jnp.arange(2)), TypeError, "input 'y' needs floats, got int64"),
        (lambda: fnn.Graph(("x", "y"), ROWS).backprop(jnp.ones(2), 1.0), ValueError, r"has shape \(2,\); give"),
        (lambda: fnn.Graph(("x", "y"), ROWS).backprop(1.0, 1.0, out_bar=jnp.ones(2)), ValueError, r"out_bar needs the output's shape \(\), got \(2,\)"),
        (lambda: fnn.graph(lambda x: x + jnp.ones(2)), TypeError, "Make an array an input"),
        (lambda: fnn.graph(lambda x: np.ones(2) * x), TypeError, "Make an array an input"),
        (lambda: fnn.graph(lambda x: x + True), TypeError, "needs a node and a number"),
        (lambda: fnn.graph(lambda x, y: x**y), TypeError, r"\*\* needs a node and a number"),
        (lambda: fnn.graph(lambda x: x if x else -x), TypeError, "has no value while its graph is written"),
        (lambda: fnn.graph(lambda x: 3.0), TypeError, "return one of its nodes, got 3.0"),
        (lambda: fnn.graph(lambda *xs: xs[0]), TypeError, "named arguments, one for each input"),
        (lambda: fnn.graph(lambda x: x.named("y")), ValueError, "input 'x' has its name from the function"),
        (lambda: fnn.graph(lambda x, y: (x + y).named("x")), ValueError, "'x' is used twice"),
        (lambda: fnn.graph(lambda x: (y := x + 1) * 2 + y.named("y")), ValueError, "'shift' is in use already"),
        (lambda: fnn.graph(lambda x: node(gates.exp, 1.0)), TypeError, "needs nodes of the graph as inputs, got float"),
        (lambda: fnn.graph(lambda x: node(gates.exp)), TypeError, "needs nodes of the graph as inputs, got none"),
        (lambda: fnn.graph(lambda x: node(jnp.exp, x)), TypeError, "gate needs to be a rule"),
        (lambda: fnn.graph(lambda x: fnn.graph(lambda y: x + y)), ValueError, "belong to different graphs"),
        (lambda: fnn.draw_graph(), ValueError, "needs graphs and a title for each or none, got 0 and 0"),
        (lambda: fnn.draw_graph(fnn.graph(ratio)), TypeError, "needs what graph.backprop"),
    ),
)  # fmt: skip
def test_wrong_graph_is_refused(no_shape_annotations, call, error, message):
    with pytest.raises(error, match=message):
        call()
