"""`python -m mindspeed_nsa.pretrain --config FILE [section.key=value ...]`, under torchrun or alone."""

import argparse
import logging
import os
import sys
import time
import warnings

from mindspeed_nsa.pretrain.job import Job


def main() -> int:
    """Run a job from the command line.

    Returns:
        0, or 2 for what a user got wrong, with one line about it on the standard error of each node, or of the one rank
        that has met it.
    """
    parser = argparse.ArgumentParser(prog="python -m mindspeed_nsa.pretrain", description="Train a GPT from a job file.")
    parser.add_argument("--config", required=True, help="job file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes the place of the file's value")
    arguments = parser.parse_args()
    # Each rank would say a screenful about what only a GPU has, and about what Megatron-core still uses of torch.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    if os.environ.get("LOCAL_RANK", "0") != "0":  # what a node has to be told, its first rank tells
        logging.getLogger("mindspeed_nsa").setLevel(logging.ERROR)
    try:
        job = Job.from_file(arguments.config, arguments.overrides)
        # A wrong job file is told before the seconds that importing torch and Megatron takes.
        from mindspeed_nsa.patches import npu_host

        if npu_host.has_npu():
            npu_host.install()
        from mindspeed_nsa.pretrain.trainer import run

        run(job)
    except ValueError as error:
        # torchrun stops all ranks when the first one ends. Where all have the same to say, the first of a node says it,
        # for which a busy machine may need some seconds.
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(20)
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


# Saving a checkpoint starts processes that import this module again.
if __name__ == "__main__":
    sys.exit(main())
