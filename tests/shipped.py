"""The job files that the project ships, and what the comments of those for clusters say."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLUSTER = [path for path in CONFIGS if "Layouts for A3 nodes" in path.read_text()]
DIES = 16


def layouts(path: Path) -> Iterator[tuple[int, int, list[str], float]]:
    """The layouts of a job file: nodes, thousands of tokens, overrides, and GB a die."""
    length, common = 0, []
    for line in path.read_text().splitlines():
        if found := re.fullmatch(r"# (\d+)k: (.*)", line):
            length, common = int(found[1]), found[2].split() if "=" in found[2] else []
        elif found := re.fullmatch(r"#   (\d+) nodes? +([\d.]+) GB ?(.*)", line):
            yield int(found[1]), length, [*common, *found[3].split()], float(found[2])


LAYOUTS = [(path, *layout) for path in CLUSTER for layout in layouts(path)]
