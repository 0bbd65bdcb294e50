"""A trace holds the steps that were asked for."""

import jax
import pytest
from jax.profiler import ProfileData

from dinosae_jax.runtime import tracing


def annotated(folder):
    """Names of the steps that a trace holds, from the annotations that `walk` made."""
    (file,) = folder.rglob("*.xplane.pb")
    planes = ProfileData.from_file(str(file)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    return sorted(name for name in names if name.startswith("step "))


def walk(trace, steps):
    for step in steps:
        trace.before(step)
        with jax.profiler.TraceAnnotation(f"step {step}"):
            result = jax.numpy.ones(2) + step
        trace.after(step, result)
    trace.close()


def test_the_named_steps_are_traced(tmp_path):
    walk(tracing.StepTrace("3:5", tmp_path), range(1, 8))
    assert annotated(tmp_path / "profile") == ["step 3", "step 4"]


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    walk(tracing.StepTrace("3:9", tmp_path), range(1, 5))
    assert annotated(tmp_path / "profile") == ["step 3", "step 4"]


@pytest.mark.parametrize(("text", "start"), [("", 1), ("3:5", 4)])
def test_nothing_is_traced_unless_its_first_step_is_met(tmp_path, text, start):
    walk(tracing.StepTrace(text, tmp_path), range(start, 8))
    assert not (tmp_path / "profile").exists()
