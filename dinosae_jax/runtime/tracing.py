"""A profile on request: a trace of a few steps for XProf or TensorBoard."""

from __future__ import annotations

import pathlib
import shutil
import tempfile

import jax
from etils import epath

from dinosae_jax import rules
from dinosae_jax.runtime import buckets, files

FOLDER = "profile"


class StepTrace:
    """Traces the steps that `profile_steps` names, on the first process, into workdir/profile."""

    def __init__(self, profile_steps: str, workdir: epath.Path):
        enabled = bool(profile_steps) and jax.process_index() == 0
        self.first, self.end = rules.profile_range(profile_steps) if enabled else (0, 0)
        self.folder = workdir / FOLDER
        # The profiler writes to a disk alone.
        self.temporary = tempfile.mkdtemp() if enabled and buckets.is_bucket(workdir) else ""
        self.place = self.temporary or self.folder
        self.tracing = False

    def before(self, step: int) -> None:
        """Starts the trace where this is its first step."""
        if step == self.first:
            jax.profiler.start_trace(self.place)
            self.tracing = True

    def after(self, step: int, result: jax.Array) -> None:
        """Waits for the step's result and ends the trace where this is its last step."""
        if self.tracing and step == self.end - 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes a trace that is still open."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
            if self.temporary:
                files.publish_folder(pathlib.Path(self.temporary), self.folder)
                shutil.rmtree(self.temporary)
