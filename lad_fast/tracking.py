"""Where a run's log goes beside log.jsonl: TensorBoard or Weights & Biases, of which the first process opens one.

A tracker always holds what log.jsonl holds: a run that goes on from a checkpoint writes the log up to there anew, so no
step comes twice, and none after the checkpoint is left over.
"""

import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["TRACKERS", "Tracker", "scalars"]


def scalars(record: dict) -> dict[str, float]:
    """A log record's numbers, but for where it stands, by their places in it: "metrics/validation/accuracy"."""
    found = {}

    def collect(place: str, value) -> None:
        if isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                collect(f"{place}/{name}" if place else str(name), inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[place] = value

    collect("", {name: value for name, value in record.items() if name not in ("step", "epoch")})
    return found


class Tracker:
    """None: nothing is written beside log.jsonl. Others are open from their ``with`` to its end.

    Args:
        output_dir: the run's folder.
        config: the run's settings by name.
    """

    def __init__(self, output_dir: Path, config: dict) -> None:
        self.output_dir, self.config = output_dir, config

    @classmethod
    def check(cls) -> None:
        """See that what it takes is installed.

        Raises:
            ImportError: it is not; the message says how to get it.
        """

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error) -> None:
        pass

    def write(self, record: dict) -> None:
        """Write one line of the log."""


class TensorBoard(Tracker):
    """Event files in ``tensorboard`` in the run's folder, in place of those of an earlier run there."""

    @classmethod
    def check(cls) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("log 'tensorboard' needs TensorBoard: pip install 'lad_fast[tensorboard]'") from error

    def __enter__(self) -> "TensorBoard":
        from torch.utils.tensorboard import SummaryWriter

        self.folder = self.output_dir / "tensorboard"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = SummaryWriter(str(self.folder))
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError):  # each line has been flushed, or its failure is on its way
            self.writer.close()

    def write(self, record: dict) -> None:
        try:
            for name, value in scalars(record).items():
                self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()
        except OSError as error:  # from TensorBoard's thread, which knows no file's name
            raise OSError(f"{self.folder} could not be written ({error})") from error


class WandB(Tracker):
    """A run of the project "lad_fast", its files in the run's folder; going on from a checkpoint makes another run."""

    @classmethod
    def check(cls) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ImportError("log 'wandb' needs Weights & Biases: pip install wandb") from error

    def __enter__(self) -> "WandB":
        import wandb

        name, config = self.output_dir.resolve().name, {key: str(value) for key, value in self.config.items()}
        try:
            self.run = wandb.init(project="lad_fast", name=name, dir=str(self.output_dir), config=config)
        except wandb.Error as error:
            reason = f"wandb.init says {str(error).strip().rstrip('.')}; with WANDB_MODE=offline it asks for no account"
            raise ValueError(f"log is 'wandb'; {reason}") from error
        return self

    def __exit__(self, *error) -> None:
        self.run.finish()

    def write(self, record: dict) -> None:
        self.run.log(scalars(record), step=record["step"])


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "tensorboard": TensorBoard, "wandb": WandB}
