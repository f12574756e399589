"""One rank of jobs that the ranks do not agree on: what each rank has to say goes to a file. Started by test_agreement.py."""

import json
import os
import sys
from pathlib import Path

from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.trainer import run


def main(config: str, cases: str) -> None:
    rank = int(os.environ["RANK"])
    # The ranks of each job find one another anew.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for case in json.loads(Path(cases).read_text()):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case["port"])}
        os.chdir(case["folders"][rank])
        said = "nothing"
        try:
            run(Job.from_file(config, case["overrides"][rank]))
        except ValueError as error:
            said = str(error)
        Path(case["said"][rank]).write_text(said)


if __name__ == "__main__":
    main(*sys.argv[1:])
