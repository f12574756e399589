"""The nodes of a job: given one by one, by a host file, or by SLURM."""

import os
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

DEFAULT_PORT = 6000


class Nodes(NamedTuple):
    """The nodes of a job, and which one this is.

    Attributes:
        nnodes: how many.
        rank: this one's number, from 0.
        master_addr: name or address of node 0, as the others reach it.
        master_port: a free port there.
        names: of all nodes in order, empty where they are not known.
    """

    nnodes: int
    rank: int
    master_addr: str
    master_port: int
    names: tuple[str, ...] = ()

    def title(self, rank: int) -> str:
        """A node as a person calls it."""
        return f"node {rank} ({self.names[rank]})" if self.names else f"node {rank}"


def find_nodes(
    nnodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int = DEFAULT_PORT,
    hostfile: Path | None = None,
    *,
    dry_run: bool = False,
) -> Nodes:
    """Find out which nodes a job has.

    `nnodes` goes before SLURM. A host file, one host a line, tells the number of nodes, and this one's rank where the
    line of this host is the only one.

    Args:
        nnodes: how many; None asks the host file, then SLURM, and is else 1.
        node_rank: this one's number; None where it can be found.
        master_addr: of node 0; None for the first host of the file or of SLURM.
        master_port: at node 0.
        hostfile: the file.
        dry_run: this host need not be one of them: its rank is 0 unless it is given.

    Raises:
        ValueError: something is missing or contradicts something else; one line that names it.
    """
    names: tuple[str, ...] = ()
    node_rank = 0 if dry_run and node_rank is None else node_rank
    if hostfile is not None:
        names = _read_hostfile(hostfile)
        if nnodes not in (None, len(names)):
            raise ValueError(f"NNODES: {nnodes}, but HOSTFILE {hostfile} has {len(names)} hosts; give one of the two")
        nnodes = len(names)
        node_rank = _find_this_host(names, hostfile) if node_rank is None else node_rank
    elif nnodes is None and "SLURM_JOB_NODELIST" in os.environ:
        names, slurm_rank = _read_slurm()
        nnodes = len(names)
        node_rank = slurm_rank if node_rank is None else node_rank
    nnodes = 1 if nnodes is None else nnodes
    if nnodes == 1:
        node_rank, master_addr = node_rank or 0, master_addr or "localhost"
    if node_rank is None:
        raise ValueError(f"NODE_RANK: not set; with NNODES {nnodes} each node needs its own, 0 to {nnodes - 1}")
    if not 0 <= node_rank < nnodes:
        allowed = f"0 to {nnodes - 1}" if nnodes > 1 else "0"
        raise ValueError(f"NODE_RANK: {node_rank}, but NNODES is {nnodes}; allowed: {allowed}")
    master_addr = master_addr or (names[0] if names else None)
    if master_addr is None:
        raise ValueError(f"MASTER_ADDR: not set; with NNODES {nnodes} it is the name or address of node 0")
    return Nodes(nnodes, node_rank, master_addr, master_port, names)


def _read_hostfile(path: Path) -> tuple[str, ...]:
    """The first word of each line; `#` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"HOSTFILE: {path}: {(error.strerror or str(error)).lower()}") from None
    names = tuple(words[0] for line in lines if (words := line.partition("#")[0].split()))
    if not names:
        raise ValueError(f"HOSTFILE: {path}: no host in it; one a line, the first is node 0")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"HOSTFILE: {path}: {twice[0]} is there {names.count(twice[0])} times; a host is one node")
    return names


def _find_this_host(names: tuple[str, ...], path: Path) -> int:
    own = socket.gethostname()
    found = [rank for rank, name in enumerate(names) if name == own] or [
        rank for rank, name in enumerate(names) if _is_here(name)
    ]
    if not found:
        raise ValueError(f"HOSTFILE: {path}: this host, {own}, is not in it; it has {', '.join(names)}")
    if len(found) > 1:
        raise ValueError(f"NODE_RANK: not set, and {' and '.join(names[rank] for rank in found)} of {path} are this host")
    return found[0]


def _is_here(name: str) -> bool:
    """Whether a name or address is this machine's: only its own can be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _read_slurm() -> tuple[tuple[str, ...], int]:
    """The hosts of this SLURM job, and the number of this one in the step that srun started."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    tasks, count = (os.environ.get(f"SLURM_STEP_NUM_{kind}", "1") for kind in ("TASKS", "NODES"))
    if int(tasks) > int(count):
        raise ValueError(f"SLURM: srun started {tasks} tasks on {count} nodes; one a node: srun --ntasks-per-node=1")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"SLURM: scontrol show hostnames {nodes}: {error}; give NNODES, NODE_RANK and MASTER_ADDR") from None
    return tuple(done.stdout.split()), int(os.environ.get("SLURM_NODEID", "0"))
