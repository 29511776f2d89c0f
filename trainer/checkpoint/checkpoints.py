"""Checkpoints: safetensors and JSON, complete or absent, for any number of ranks.

RUN_DIR/checkpoints/step-00000600/   weights, ema, ema-WIDTH, optimizer, pool-R-of-W (.safetensors), state.json
                                     and if the weights take more than ONE_FILE, weights-R-of-W and so on
RUN_DIR/checkpoints/latest           the name of the newest complete checkpoint
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ambient_core.errors import UserError, WorkFailed
from ambient_core.paths import replacing, sync
from trainer.checkpoint.retention import CheckpointConfig, kept
from trainer.checkpoint.shares import Share, file_of, write_share
from trainer.checkpoint.state import TrainState, read_state, write_state
from trainer.checkpoint.tensors import State, write
from trainer.engine.distributed import Ranks


class _Begun:
    """A checkpoint that is being written. error: why this rank could not write it, if so."""

    def __init__(self, final: Path, partial: Path) -> None:
        self.final, self.partial = final, partial
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as caught:  # of any kind: an unnoticed error would pass for success
                self.error = caught

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        if self._thread:
            self._thread.join()


class Checkpoints:
    """The checkpoints of one run directory. They are written one at a time, while training continues."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = run_dir / "checkpoints", config
        self._begun: _Begun | None = None

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        path = self.folder / (named(pointer) or "nothing")
        if not (path / "state.json").is_file():
            raise UserError(
                f"{pointer} names {path.name}, which is not a complete checkpoint: write the name of a complete one "
                "in the same folder into it",
                field=pointer,
                code="not_found",
            )
        return path

    def find(self, which: str) -> Path | None:
        """Returns the path of a checkpoint, or None if nothing was saved yet. which: latest, best or a step. Raises
        UserError if there are only other checkpoints."""
        steps = self.steps()
        if which == "latest" or not steps:
            return self.latest()
        if which == "best":
            if self.config.keep_best is None:
                raise UserError(
                    "--checkpoint best: this run does not judge its checkpoints; train it with checkpoint.keep_best",
                    field="--checkpoint",
                    code="not_found",
                )
            if (best := _best(self._scores(steps))) is not None:
                return self.path(best)
            raise UserError(
                f"--checkpoint best: no checkpoint in {self.folder} is judged by {self.config.keep_best.metric} yet; "
                "those at multiples of checkpoint.every are",
                field="--checkpoint",
                code="not_found",
            )
        if which.isdecimal() and int(which) in steps:
            return self.path(int(which))
        raise UserError(
            f"--checkpoint {which}: must be latest, best or a step; {self.folder} has {', '.join(map(str, steps))}",
            field="--checkpoint",
            code="unknown",
        )

    def begin(
        self, ranks: Ranks, state: TrainState, full: Mapping[str, State], shares: Mapping[str, Share], pool: State
    ) -> None:
        """Begins to write a checkpoint. A thread writes the files, and `end` completes the checkpoint. A collective.
        Each rank writes its rows of the pool.

        full: full tensors, which rank 0 writes, by the names of their files. shares: instead of these, each rank's
        share. The tensors must not be changed until `end` returns."""
        self.end(ranks)
        count = ranks.world if shares else 0
        final, state = self.path(state.step), replace(state, pools=ranks.world if pool else 0, shares=count)
        begun = self._begun = _Begun(final, self.folder / f".{final.name}.partial")
        if ranks.is_main:
            try:
                shutil.rmtree(begun.partial, ignore_errors=True)
                # Without its parents: if a disk was lost, nothing may be written in its place.
                self.folder.mkdir(exist_ok=True)
                begun.partial.mkdir()
            except OSError as caught:
                begun.error = caught
        ranks.barrier()

        def write_all() -> None:
            files: dict[str, State] = {f"{name}.safetensors": tensors for name, tensors in full.items()}
            if not ranks.is_main:
                files = {}
            if pool:
                files[file_of("pool", ranks.rank, ranks.world)] = pool
            # Syncs each file separately, because other ranks are still writing other files of the folder.
            for name, tensors in files.items():
                write(tensors, begun.partial / name)
                sync(begun.partial / name)
            for name, share in shares.items():
                file = begun.partial / file_of(name, ranks.rank, ranks.world)
                write_share(share, file)
                sync(file)
            if ranks.is_main:
                sync(write_state(state, begun.partial))

        if begun.error is None:
            begun.start(write_all)

    @property
    def written(self) -> bool:
        """Whether a checkpoint was begun and this rank has written its part, so that `end` need not wait for this
        rank."""
        return self._begun is not None and not self._begun.running

    def end(self, ranks: Ranks) -> None:
        """Waits for the checkpoint that was begun, if any, and moves it into place; then it updates the pointer
        `latest`. A collective. Raises WorkFailed on all ranks if one of them could not write."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        begun.join()
        self._agree(ranks, begun)
        if ranks.is_main:
            try:
                sync(begun.partial)
                step = int(begun.final.name.removeprefix("step-"))
                if begun.final.exists():  # from an earlier start that was killed before it updated the pointer
                    self._delete(step)
                begun.partial.replace(begun.final)
                self.point_at(step)
                self._clear(step)
            except OSError as caught:
                begun.error = caught
        self._agree(ranks, begun)

    def _agree(self, ranks: Ranks, begun: _Begun) -> None:
        """Raises WorkFailed on all ranks if one of them has an error."""
        if not ranks.any(begun.error is not None):
            return
        if ranks.is_main:  # frees the space on a full disk
            shutil.rmtree(begun.partial, ignore_errors=True)
        raise WorkFailed(
            f"cannot write the checkpoint {begun.final} ({begun.error or 'another rank failed'}); the last good "
            f"one is {self._last_good()}: free space or repair the disk, and run it again to resume from it"
        )

    def _last_good(self) -> str:
        try:
            return str(self.latest() or "none")
        except (OSError, UserError) as error:
            return f"unknown ({error})"

    def point_at(self, step: int) -> None:
        """Makes the checkpoint of this step the latest one."""
        with replacing(self.folder / "latest", alone=True) as pointer:
            pointer.write_text(self.path(step).name)

    def _delete(self, step: int) -> None:
        """Deletes a checkpoint. It is renamed first, so that a checkpoint is never present in part."""
        gone = self.folder / f".{self.path(step).name}.gone"
        if gone.exists():  # left by a process that was killed during the deletion
            shutil.rmtree(gone)
        self.path(step).replace(gone)
        shutil.rmtree(gone)

    def _clear(self, newest: int) -> None:
        """Deletes the checkpoints that need not be kept."""
        for gone in self.folder.glob(".step-*.gone"):  # left by a process that was killed during a deletion
            shutil.rmtree(gone)
        steps = self.steps()
        scores: dict[int, float] = {}
        unknown: list[int] = []
        if self.config.keep_best:
            for step in steps:
                try:
                    scores |= self._scores([step])
                except UserError as error:
                    unknown.append(step)
                    print(f"warning: {error}: whether it was the best is not known, so it stays", file=sys.stderr)
        stay = kept(steps, newest, self.config, _best(scores)).union(unknown)
        for step in steps:
            if step not in stay:
                self._delete(step)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Returns the steps of the existing checkpoints, in order."""
        numbers = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _scores(self, steps: Iterable[int]) -> dict[int, float]:
        """Returns the scores, by step, of the checkpoints that keep_best has judged. They are read from each
        checkpoint's own state, so there is no other record of the best one that could be lost or wrong. Raises
        UserError for a state that cannot be read."""
        assert self.config.keep_best
        metric = self.config.keep_best.metric
        tallies = {step: read_state(self.path(step)).tally for step in steps}
        scores = {step: tally.score(metric) for step, tally in tallies.items() if tally}
        return {step: score for step, score in scores.items() if score is not None}


def named(pointer: Path) -> str:
    """Returns the name of the checkpoint that a `latest` file holds, or "" if it holds no such name."""
    name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    return name if name.startswith("step-") and "/" not in name and "\0" not in name else ""


def _best(scores: Mapping[int, float]) -> int | None:
    """Returns the step with the lowest score; of equal scores, the earliest step."""
    return min(scores, key=lambda step: (scores[step], step), default=None)
