"""Flags of the compiler for the tests and for the processes that they start."""

import importlib.metadata

# The compiler's optimisation costs more than it saves in tests, whose programs run once or twice.
FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no such choice
    FAST_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # compiles twice as fast


def flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices."""
    return (
        f"--xla_force_host_platform_device_count={devices} {FAST_TO_COMPILE}"
        # On a busy machine a device may be late at a collective; the default is to abort at 40 s.
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
        " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    )
