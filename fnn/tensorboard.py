"""A run's numbers for TensorBoard.

A file of events is a row of records: the length of the data (8 bytes), its checksum, the data, their checksum
(4 bytes each; Google's TFRecord). The data of an epoch are one record, written whole: the file is opened for
it and closed again, so nothing stands in a buffer when a process is killed, and a folder that vanished is
made again.
"""

import os
import time
from pathlib import Path

import jax

from .history import EpochReport


class TensorBoard:
    """A callback of `fit` that writes every epoch's numbers as TensorBoard's scalars.

    folder: of this run; `tensorboard --logdir` takes it, or the folder above of many runs

    The scalars are "train/cost", "validation/cost" and so on for every metric, at `report.step`, the steps
    taken so far; in float32, as TensorBoard has them. What was written is there even if the process is killed
    right after. Every object has a file of its own, and a run that goes on from its checkpoint goes on in the
    same folder: where it repeats epochs, the later numbers count. Another run needs another folder. Of
    several processes the first one writes.

    Raises TypeError for a folder that is no path, ImportError without the package tensorboardX, which is in
    the extra `tensorboard`, and OSError if a file cannot be written.

    >>> import fnn, jax, optax, os, tempfile
    >>> X = jax.random.normal(jax.random.key(0), (100, 3))
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> folder = tempfile.mkdtemp()
    >>> history = fnn.fit(cost, optax.sgd(0.1), fnn.init(jax.random.key(1), (3, 1)), (X, X[:, :1]),
    ...                   key=jax.random.key(2), epochs=5, batch_size=32, progress=False,
    ...                   callbacks=[fnn.TensorBoard(folder)])
    >>> [name.split(".")[2] for name in os.listdir(folder)]
    ['tfevents']
    """

    def __init__(self, folder: str | os.PathLike[str]):
        if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
            raise TypeError(f"TensorBoard: folder needs to be a str or Path, got {folder!r}.")
        try:
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import masked_crc32c
        except ImportError as error:
            hint = 'pip install "fnn[tensorboard]"'
            raise ImportError(f"TensorBoard: needs the package tensorboardX: {hint}.") from error
        self.folder = Path(folder).absolute()  # wherever the process goes meanwhile
        self._events, self._summaries, self._checksum = event_pb2, summary_pb2, masked_crc32c
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = self.folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._step: int | None = None  # of the last report

    def __call__(self, report: EpochReport) -> None:
        if jax.process_index() != 0:
            return
        records = []
        if self._step is None:
            records.append(self._record(file_version="brain.Event:2"))
        if self._step is None or report.step <= self._step:
            # A session starts: numbers of this step and later ones, of a run before it, count no more.
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            records.append(self._record(step=report.step, session_log=start))
        scalars = [
            self._summaries.Summary.Value(tag=f"{part}/{name}", simple_value=number)
            for part, numbers in (("train", report.train), ("validation", report.validation))
            for name, number in numbers.items()
        ]
        records.append(self._record(step=report.step, summary=self._summaries.Summary(value=scalars)))
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._file, "ab") as file:
            file.write(b"".join(records))
        self._step = report.step

    def _record(self, **fields) -> bytes:
        data = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = len(data).to_bytes(8, "little")
        checksums = [self._checksum(piece).to_bytes(4, "little") for piece in (length, data)]
        return length + checksums[0] + data + checksums[1]
