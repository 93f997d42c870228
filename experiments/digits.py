"""Does a network whose backward pass was derived by hand learn to read handwritten digits?

    python -m experiments.digits        (--help lists the flags)

Data: the 1,797 digits of 8 × 8 pixels that scikit-learn ships (Alpaydin & Kaynak 1998). A fifth of each
class is held out for the test.

Expected answer: yes. The gradient differs from jax.grad's by a few rounding errors, and at least 97 % of
the test digits are read correctly: 98.6 % on average over seeds 0 to 39, 97.5 % in the worst case. The
figure, digits.png beside this file, shows the training and the mistakes. Needs the extra `experiments`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fnn
from experiments import command
from experiments.command import expect
from experiments.figures import new_figure

Data = tuple[np.ndarray, np.ndarray]  # X (N, 64) float32, y (N,) int32

# name -> (optimiser, its learning rate unless one is given)
OPTIMIZERS: dict[str, tuple[Callable[[float], optax.GradientTransformation], float]] = {
    "adam": (optax.adam, 1e-3),
    "adamw": (optax.adamw, 1e-3),
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 0.02),
    "rmsprop": (optax.rmsprop, 1e-3),
    "sgd": (optax.sgd, 0.1),
}
TRAINING_DIGITS = 1437
QUICK_EPOCHS = 5
COLUMNS, MAX_ROWS = 10, 2  # of the figure's grid of mistakes


@dataclass(frozen=True)
class Flags(command.Flags):
    """Trains a network on handwritten digits, with the backward pass derived by hand."""

    widths: tuple[int, ...] = (512, 256)
    """Widths of the hidden layers, any number of them: --widths 64 32 16; none is a single layer."""
    activation: Literal["relu", "tanh", "sigmoid", "softplus", "silu", "gelu"] = "relu"
    """Activation of the hidden layers."""
    optimizer: Literal["adam", "adamw", "momentum", "rmsprop", "sgd"] = "adam"
    """Optimiser, one of optax."""
    learning_rate: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: the optimiser's own)")
    ] = None
    """Learning rate. Its default is 0.001 with adam, adamw and rmsprop, 0.02 with momentum, 0.1 with sgd."""
    batch_size: int = 32
    """Examples in each step."""
    epochs: int = 20
    """Times that training goes through the data."""
    l2: float = 0.0
    """Factor λ of the penalty ½ λ ‖W‖² on the weights."""
    quick: bool = False
    """At most 5 epochs, for a first look."""

    def check(self) -> None:
        super().check()
        for width in self.widths:
            expect("--widths", "integers of at least 1", width, width >= 1)
        rate = self.learning_rate
        expect("--learning-rate", "a finite number above 0", rate, rate is None or 0 < rate < inf)
        what = f"an integer from 1 to {TRAINING_DIGITS}, the number of training digits"
        expect("--batch-size", what, self.batch_size, 1 <= self.batch_size <= TRAINING_DIGITS)
        expect("--epochs", "an integer of at least 1", self.epochs, self.epochs >= 1)
        expect("--l2", "a finite number of at least 0", self.l2, 0 <= self.l2 < inf)


def load(seed: int) -> tuple[Data, Data]:
    """The digits for training and those for the test, a fifth of each class; pixels from 0 to 1."""
    X, y = load_digits(return_X_y=True)
    X, y = np.asarray(X / 16, np.float32), np.asarray(y, np.int32)
    rows, test_rows = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=seed)
    return (X[rows], y[rows]), (X[test_rows], y[test_rows])


def standardised(X: np.ndarray, X_train: np.ndarray) -> np.ndarray:
    """Every pixel's mean becomes 0, and the variance of all pixels together 1, on the training data.

    One scale for all: some pixels are almost always 0, and a scale of their own would blow up the rest.
    """
    X_mean = X_train.mean(axis=0)
    return (X - X_mean) / (X_train - X_mean).std()


def gradients(cost: fnn.Cost, params: Any, X: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """The gradient with respect to the parameters, by hand and by jax.grad."""
    # Some GPUs would round the factors of a product to 10 bits. Compiled apart, or the compiler could
    # merge the two into one computation.
    with jax.default_matmul_precision("highest"):
        _, ours = jax.jit(fnn.value_and_grad(cost))(params, X, y)
        theirs = jax.jit(jax.grad(cost))(params, X, y)
    return jax.device_get((ours, theirs))


def rounding_errors(ours: Any, theirs: Any) -> dict[str, float]:
    """max |ours - theirs| / (eps max |theirs|) for every array of a gradient.

    The unit is the rounding error of the array's largest entry.
    """
    units = {}
    for l, layers in enumerate(zip(ours, theirs, strict=True), start=1):
        for name, our, their in zip(("W", "b"), *layers, strict=True):
            difference, unit = np.abs(our - their).max(), np.finfo(their.dtype).eps * np.abs(their).max()
            if difference == 0:  # also where all is 0, behind a relu that is never active
                apart = 0.0
            elif np.isfinite(difference) and unit > 0:
                apart = float(difference / unit)
            else:
                apart = inf
            units[f"{name} of layer {l}"] = apart
    return units


def model(flags: Flags) -> tuple[fnn.Network, fnn.Cost, Any]:
    """The network, its cost, and its parameters before training."""
    net = fnn.mlp(getattr(fnn, flags.activation))
    cost = fnn.cost(net, fnn.softmax_cross_entropy_with_integer_labels, l2=flags.l2)
    key = jax.random.fold_in(jax.random.key(flags.seed), 0)
    params = fnn.init(key, (64, *flags.widths, 10), weights=fnn.he_normal, dtype=jnp.float32)
    return net, cost, params


def train(flags: Flags, net: fnn.Network, cost: fnn.Cost, params: Any, data: Data, test: Data) -> fnn.History:
    """Trains with a progress bar; cost and accuracy on both parts after every epoch."""
    make_optimizer, rate = OPTIMIZERS[flags.optimizer]
    return fnn.fit(
        cost,
        make_optimizer(flags.learning_rate or rate),
        params,
        data,
        key=jax.random.fold_in(jax.random.key(flags.seed), 1),
        epochs=min(flags.epochs, QUICK_EPOCHS) if flags.quick else flags.epochs,
        batch_size=flags.batch_size,
        validation=test,
        metrics={"accuracy": fnn.accuracy(net)},
    )


def draw(history: fnn.History, X: np.ndarray, y: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Cost and accuracy by epoch, and the test digits that were mistaken, the surest mistakes first.

    X: pixels of the test digits, from 0 to 1
    probabilities: the network's, (N, 10)
    """
    answers, surety = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(answers != y)
    wrong = wrong[np.argsort(-surety[wrong], kind="stable")]
    rows = min(-(-len(wrong) // COLUMNS), MAX_ROWS)

    heights = (3.3, 0.4 + 1.35 * rows)
    right = len(y) - len(wrong)
    finding = f"{right} of {len(y)} digits not seen in training are read correctly ({right / len(y):.1%})"
    figure = new_figure(finding, 9, 0.4 + sum(heights))
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    cost_axes, accuracy_axes = top.subplots(1, 2)
    _draw_curves(cost_axes, history, "cost")
    cost_axes.set(yscale="log", ylabel="cost (nats per digit)", title="Cost")
    _draw_curves(accuracy_axes, history, "accuracy")
    accuracy_axes.set(ylabel="digits read correctly", title="Accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _draw_mistakes(bottom, X[wrong], y[wrong], answers[wrong], surety[wrong], rows)
    return figure


def _draw_curves(axes: Axes, history: fnn.History, name: str) -> None:
    epochs = np.arange(1, len(history.seconds) + 1)
    # `fit` takes the training cost as each batch is used, everything else after the epoch.
    label = "training, mean over the epoch" if name == "cost" else "training"
    axes.plot(epochs, history.train[name], "o--", markersize=3, color="tab:blue", label=label)
    axes.plot(epochs, history.validation[name], "s-", markersize=3, color="tab:orange", label="test")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_mistakes(panel: SubFigure, X, y, answers, surety, rows: int) -> None:
    if not rows:
        panel.suptitle("Mistakes: none")
        return
    shown = min(len(X), rows * COLUMNS)
    columns = -(-shown // rows)  # rows of equal length, as far as that goes
    panel.suptitle(
        f"Mistakes, the surest first ({shown} of {len(X)} shown): "
        "true digit → the network's answer, and its probability"
    )
    for n, axes in enumerate(panel.subplots(rows, columns, squeeze=False).flat):
        if n >= shown:
            axes.set_axis_off()
            continue
        axes.imshow(X[n].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
        axes.set_title(f"{y[n]} → {answers[n]}\n{surety[n]:.0%}", fontsize=10)


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    start = time.perf_counter()
    (X_train, y_train), (X_test, y_test) = load(flags.seed)
    data = standardised(X_train, X_train), y_train
    test = standardised(X_test, X_train), y_test
    net, cost, params = model(flags)
    print(fnn.summary(params))
    errors = rounding_errors(*gradients(cost, params, *data))
    where, units = max(errors.items(), key=lambda item: item[1])
    print(
        f"\nGradient: by hand and by jax.grad differ by at most {units:.1f} rounding errors, in {where};"
        "\n          one is eps(float32) times the largest entry of the array.\n",
        flush=True,  # before the progress bar, which goes to standard error
    )
    history = train(flags, net, cost, params, data, test)
    probabilities = np.asarray(fnn.softmax(net(history.params, jnp.asarray(test[0]))))
    figure = draw(history, X_test, y_test, probabilities)
    accuracy, test_accuracy = history.train["accuracy"][-1], history.validation["accuracy"][-1]
    print(f"\nAccuracy: {accuracy:.2%} of the training digits, {test_accuracy:.2%} of the test digits")
    seconds, in_all = history.seconds.sum(), time.perf_counter() - start
    print(f"Time:     {seconds:.1f} s of training, {in_all:.1f} s with the check and the figure")
    return figure


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
