"""The environment of a job's processes. What the user has set stays as it is."""

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """A variable that a launch sets where the user has not."""

    name: str
    value: str
    why: str


# What public scripts for Atlas A3 set. docs/launch.md has the same table; a test holds them together.
VARIABLES = (
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron refuses tensor parallelism without it"),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "device memory in growing segments: less is lost to gaps"),
    Variable("TASK_QUEUE_ENABLE", "2", "operators are prepared on a thread of their own and queued: the host keeps ahead"),
    Variable("CPU_AFFINITY_CONF", "1", "a rank's threads stay on the cores next to its die"),
    Variable("HCCL_CONNECT_TIMEOUT", "3600", "seconds until ranks have found each other: some index data or compile first"),
    Variable("HCCL_EXEC_TIMEOUT", "3600", "seconds that a collective waits for its slowest rank, which may be saving"),
)

# What depends on the machine: never set here, shown by a dry run where the user has set it.
OF_THE_MACHINE = (
    "ASCEND_RT_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HCCL_IF_BASE_PORT",
    "HCCL_LOGIC_SUPERPOD_ID",
    "HCCL_SOCKET_IFNAME",
    "MEGATRON_LM_PATH",
    "MINDSPEED_PATH",
    "NSA_ASCEND_PLAN",
    "OMP_NUM_THREADS",
    "STREAMS_PER_DEVICE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


def complete(environment: dict[str, str]) -> dict[str, str]:
    """An environment with the variables that it lacks."""
    return {variable.name: variable.value for variable in VARIABLES} | environment


def shown() -> dict[str, str]:
    """The part of a job's environment that matters to it, in order of names."""
    names = {variable.name for variable in VARIABLES} | set(OF_THE_MACHINE)
    return {name: value for name, value in sorted(complete(dict(os.environ)).items()) if name in names}
