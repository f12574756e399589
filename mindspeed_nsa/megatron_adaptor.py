"""The one line of a MindSpeed job: `import mindspeed_nsa.megatron_adaptor`, where it says `import mindspeed.megatron_adaptor`.

NSA joins MindSpeed's features, then the host's adaptor is imported and applies their patches: MindSpeed-LLM's, which stands on
MindSpeed, where that is installed, else MindSpeed's. `NSA_HOST_ADAPTOR` names another module.

Raises:
    RuntimeError: the host's adaptor was imported before.
    ValueError: this MindSpeed cannot take the feature, or a flag of NSA is wrong.
"""

import importlib
import importlib.util
import os

from mindspeed_nsa.patches.mindspeed import join


def _host_adaptor() -> str:
    host = "mindspeed_llm" if importlib.util.find_spec("mindspeed_llm") else "mindspeed"
    return os.environ.get("NSA_HOST_ADAPTOR", f"{host}.megatron_adaptor")


join()
importlib.import_module(_host_adaptor())
