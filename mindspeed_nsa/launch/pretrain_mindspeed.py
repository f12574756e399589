"""`torchrun launch/pretrain_mindspeed.py FLAGS`: Megatron-LM's own pretrain_gpt under MindSpeed, with this project's adaptor.

`MEGATRON_LM_PATH` names Megatron-LM; MindSpeed is installed, or `MINDSPEED_PATH` names it. Without `--nsa-config FILE`
nothing of the host changes.
"""

import importlib
import sys

from mindspeed_nsa.launch import hosts


def main() -> None:
    """Pretrain as the flags say.

    Raises:
        ValueError: a path is not set or names something else.
    """
    sys.path[:0] = [str(hosts.megatron_lm()), str(hosts.mindspeed())]
    # Before anything of Megatron: it joins MindSpeed, which patches what is imported after it.
    importlib.import_module("mindspeed_nsa.megatron_adaptor")
    import pretrain_gpt
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    datasets = pretrain_gpt.train_valid_test_datasets_provider
    datasets.is_distributed = True
    pretrain(datasets, pretrain_gpt.model_provider, ModelType.encoder_or_decoder, pretrain_gpt.forward_step)


# Saving a checkpoint starts processes that import this module again.
if __name__ == "__main__":
    main()
