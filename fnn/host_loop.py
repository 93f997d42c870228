"""The loop on the host around compiled calls, which `fit` and `fit_batches` share: `follow`.

It asks a `Source` for so many epochs in one call, looks at their numbers, shows them, keeps the best
parameters, saves, and decides when to stop; several processes decide together. Where the epochs come from is
the source's: data in memory (`runs.py`) or a stream of batches (`streams.py`).
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from .arguments import check_count
from .history import Callback, DivergenceError, EarlyStopping, History, Numbers, Rows
from .processes import alone, answers, check_agreed, check_launcher
from .progress import progress_bar
from .resume import RunFolder, terminated
from .sharding import Layout
from .train import TrainState, copied, first_state

SECONDS = 0.2  # of epochs in one compiled call: often enough for a bar, and for SIGTERM
UNSEEN_SECONDS = 5.0  # likewise where neither is asked for; a call allocates its memory anew
KEPT_SECONDS = 10.0  # until the state is copied anew: often would cost, late a divergence would replay long
SKIPPED_IN_A_ROW = 10  # steps without a finite gradient after which skipping is no help


def begin(
    where: str,
    optimizer: optax.GradientTransformation,
    params: Any,
    key: Any,
    data: Any,
    layout: Layout | None,
    run: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[TrainState, Any]:
    """The state before the first step, and the data, placed as the layout says.

    run, options: as for `follow`; the same in all processes, as they decide what these do
    """
    if layout is None:
        if options["checkpoint"] is not None and jax.process_count() > 1:
            raise ValueError(
                f"{where}: with several processes checkpoint= needs a layout, such as fnn.data_parallel(); "
                "without one every process trains for itself."
            )
        return first_state(optimizer, params, key), data
    check_launcher(where)
    check_agreed(where, {**run, **options, "callbacks": len(options["callbacks"])})
    # Split before there is an optimiser's state: whole, it may not fit on a device.
    params, key = layout.put(params, params), layout.put_whole(key)
    return _laid_out_state(optimizer, layout, params, key), layout.put_whole(data)


@partial(jax.jit, static_argnums=(0, 1))
def _laid_out_state(optimizer, layout, params, key):
    return layout.placed(params, first_state(optimizer, params, key))


class Advance(NamedTuple):
    """What came of some epochs."""

    state: TrainState
    before: TrainState | None  # the last of these epochs, if that is not finite
    done: int  # epochs; 0 at the end of a stream
    seconds: float  # for each, without a search for the one that is not finite
    rows: Rows  # of `done` epochs, or more, along a first axis


@runtime_checkable
class Source(Protocol):
    """Epochs to be had: data in memory, or a stream of batches."""

    @property
    def steps(self) -> int:
        """In an epoch."""
        ...

    @property
    def examples(self) -> int:
        """Likewise; 0 if that is not known yet."""
        ...

    def row(self, state: TrainState) -> Rows:
        """Arrays, or their shapes, of the numbers of an epoch."""
        ...

    def advance(self, state: TrainState, n: int, keep: bool) -> Advance:
        """At most n epochs from here, until one is not finite.

        keep: to begin again from `state` where an epoch diverges, and not to reuse its memory, which before
            the first epoch is in part the caller's
        """
        ...

    def explain(self, advance: Advance, epoch: int) -> str:
        """What went wrong in the last of these epochs, which is number `epoch` of the run."""
        ...


def follow(
    source: Source,
    state: TrainState,
    *,
    epochs: int | None,
    names: Sequence[str],
    records: Sequence[str],
    early_stopping: EarlyStopping | None,
    callbacks: Sequence[Callback],
    skips: bool,
    checkpoint: Any,
    run: dict[str, Any],
    together: bool,
    progress: bool,
) -> History:
    """The loop on the host around compiled calls: numbers, the best epoch, checkpoints, and when to stop.

    run: what a run has to have in common with the one that it goes on with (`resume.fingerprint`)
    together: whether all processes are in this run, and so decide with each other
    """
    ask = answers if together else alone
    numbers = Numbers(names, records)
    watches = bool(callbacks) or early_stopping is not None
    best: tuple[int, Any] | None = None
    epoch, folder, stopped = 0, None, False
    if checkpoint is not None:
        run |= {"numbers": names, "records": records}
        run |= {"on_divergence": "skip" if skips else "raise", "early_stopping": repr(early_stopping)}
        folder = RunFolder(checkpoint, run)
        row = source.row(state)

        def like(epoch, step):
            return state, state.params, 0, False, numbers.like(epoch, step, row)

        restored = folder.restore(like)
        if restored is not None:
            epoch, (state, best_params, best_epoch, stopped, saved) = restored
            if epochs is not None and epoch > epochs:
                raise ValueError(
                    f"fit: {checkpoint} has {epoch} epochs of this run, more than epochs={epochs}; ask for "
                    "at least as many, or use another folder."
                )
            numbers.restore(saved)
            best = (best_epoch, best_params) if best_epoch else None

    def history(params):
        skipped = int(state.optimizer_state.total_notfinite) if skips else 0
        return numbers.history(params, None if best is None else best[0], skipped)

    def save():
        if folder is not None:
            best_epoch, best_params = (0, state.params) if best is None else best
            numbers.agree()
            tree = state, best_params, best_epoch, stopped, numbers.tree()
            folder.save(epoch, int(state.step), tree, history(None).json_lines())

    catch = terminated() if folder is not None else nullcontext(lambda: False)
    pace = SECONDS if progress or folder is not None else UNSEEN_SECONDS
    is_first = jax.process_index() == 0 or not together
    sizes = {"steps": source.steps, "examples": source.examples}
    bar = progress_bar(epochs, names, show=progress and is_first, **sizes)
    with bar as show, catch as is_terminated:
        at_once, calls, ends, keep, kept_at = 1, 0, False, True, 0.0
        while (epochs is None or epoch < epochs) and not stopped and not ends:
            kept_at = time.perf_counter() if keep else kept_at
            n = at_once if epochs is None else min(at_once, epochs - epoch)
            advance = source.advance(state, n, keep)
            state = advance.state
            if not advance.done:  # the stream has ended
                break
            good = advance.done - (advance.before is not None)
            numbers.add(advance.rows, good, advance.seconds)
            if advance.before is not None:
                message = source.explain(advance, epoch + good + 1)
                raise DivergenceError(message, history(advance.before.params if best is None else best[1]))
            for _ in range(good):
                epoch += 1
                show(epoch, numbers.train[epoch - 1], numbers.validation[epoch - 1], numbers.seconds[-1])
            if watches:  # an epoch for each call
                is_best = early_stopping and numbers.is_best(early_stopping, best and best[0])
                params = copied(state.params) if is_best or callbacks else None  # the state's do not last
                if is_best:
                    best = epoch, params
                report = numbers.report(int(state.step), params)
                stopped = any([callback(report) is True for callback in callbacks])
                if early_stopping and best and epoch - best[0] >= early_stopping.patience:
                    stopped = True
            else:  # the first call may have compiled: then its epochs are shorter than they seem
                in_time = int(pace / max(numbers.seconds[-1], 1e-6))
                at_once = max(1, min(in_time, 4 * at_once, len(advance.rows.costs)))
            calls += 1
            # What a clock, a signal or a callback says may differ between processes.
            is_due = folder is not None and folder.is_due
            is_old = time.perf_counter() - kept_at > KEPT_SECONDS
            everyone = ask(at_once, is_terminated(), is_due, stopped, is_old)
            at_once = int(everyone[0, 0])
            ends, is_due, stopped, keep = (bool(column.any()) for column in everyone[:, 1:].T)
            if is_due and not ends:
                save()
        if calls:
            save()
        if folder is not None and calls and not ends:
            folder.draw(history(None))
        if ends or ask(is_terminated()).any():
            print(f"fit: SIGTERM after epoch {epoch}, saved in {checkpoint}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
    return history(state.params if best is None else best[1])


@lru_cache(maxsize=16)  # one for each optimiser, so that equal runs are compiled once
def skipping(optimizer):
    return optax.apply_if_finite(optimizer, SKIPPED_IN_A_ROW)


def check_early_stopping(rule: Any, names: Sequence[str]) -> None:
    if rule is None:
        return
    if not isinstance(rule, EarlyStopping):
        raise TypeError(
            f"fit: early_stopping needs to be made by fnn.EarlyStopping(patience=10), got {rule!r}."
        )
    if rule.monitor not in names:
        raise ValueError(
            f"fit: early_stopping monitors {rule.monitor!r}, but the numbers of this run are "
            f"{', '.join(map(repr, names))}; give it as one of metrics."
        )
    check_count("fit", "patience of early_stopping", rule.patience)
    if not (isinstance(rule.min_delta, int | float) and 0 <= rule.min_delta < float("inf")):
        raise ValueError(
            "fit: min_delta of early_stopping needs to be a finite number, at least 0; "
            f"got {rule.min_delta!r}."
        )
