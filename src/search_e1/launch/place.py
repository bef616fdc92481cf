"""Which of a run's machines this is: as the config says, else as a launcher or scheduler that starts one process on each."""

import os
from dataclasses import dataclass

from search_e1.errors import ConfigError

# How many nodes there are and which one this is, as it is said by whoever writes a job by hand, Kubeflow, torchrun, and `srun`.
_VARIABLES = (
    ("NNODES", "NODE_RANK"),
    ("PET_NNODES", "PET_NODE_RANK"),
    ("GROUP_WORLD_SIZE", "GROUP_RANK"),
    ("SLURM_STEP_NUM_NODES", "SLURM_NODEID"),
)
# How many processes they have started in all.
_STARTED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True, slots=True)
class Place:
    """One of the machines that work on a run."""

    node: int = 0
    """The first one's process runs the loop and writes; the others' take part in the stages."""
    nodes: int = 1

    def __str__(self) -> str:
        return f"node {self.node} of {self.nodes}"


def place(nodes: int | None = None, node: int | None = None) -> Place:
    """``nodes`` and ``node`` as the config has them, else as the environment says, else this machine alone.

    Raises:
        ConfigError: that makes no sense, or a launcher has started something else than one process on each machine.
    """
    told = _told()
    found = Place(told.node if node is None else node, told.nodes if nodes is None else nodes)
    if not 0 <= found.node < found.nodes:
        raise ConfigError(
            f"node {found.node} of {found.nodes}: nodes are counted from 0; set launch.nodes and launch.node, or neither under "
            "srun and torchrun"
        )
    for name in _STARTED:
        if (started := os.environ.get(name, "1")) not in ("1", str(found.nodes)):
            raise ConfigError(
                f"{name} = {started}: started as one of {started} processes, on {found.nodes} machine"
                f"{'s' if found.nodes > 1 else ''}; start one on each (srun --ntasks-per-node=1), which starts a process for "
                "each GPU itself (launch.processes)"
            )
    return found


def _told() -> Place:
    for count, number in _VARIABLES:
        nodes, node = os.environ.get(count, ""), os.environ.get(number, "")
        if nodes.isdigit() and node.isdigit() and int(nodes) > 1:
            return Place(int(node), int(nodes))
    return Place()
