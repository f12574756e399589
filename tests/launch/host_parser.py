"""Reads flags as a MindSpeed job does: Megatron-LM's parser with MindSpeed's features and this project's; the CANN is emulated.

A JSON object a line, {"flags": [...], "ranks": n}, is answered by one: the arguments once Megatron has validated them, NSA's
settings, the rows of a byte tokenizer's vocabulary, and the configuration of the model, its values as text.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the hosts print a lot
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.emulated_cann import device  # noqa: E402

device.start()


def main():
    requests = [json.loads(line) for line in sys.stdin]
    sys.argv = ["pretrain", *requests[0]["flags"]]
    sys.path[:0] = [os.environ["MEGATRON_LM_PATH"], os.environ["MINDSPEED_PATH"]]
    import mindspeed_nsa.megatron_adaptor  # noqa: F401  patches what is imported after it

    for request in requests:
        print(json.dumps(read(**request), default=str), file=answers, flush=True)


def read(flags, ranks):
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
    from megatron.training.global_vars import set_args
    from megatron.training.tokenizer.tokenizer import _vocab_size_with_padding

    from mindspeed_nsa.patches.mindspeed import read_settings

    sys.argv = ["pretrain", *flags]
    os.environ |= {"WORLD_SIZE": str(ranks), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    args = validate_args(parse_args())
    set_args(args)
    config = core_transformer_config_from_args(args)
    nsa = read_settings(args)
    return {
        "args": vars(args),
        "nsa": nsa and nsa.model_dump(),
        "vocabulary": _vocab_size_with_padding(257, args),
        "config": {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)},
    }


if __name__ == "__main__":
    main()
