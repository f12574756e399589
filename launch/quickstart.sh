#!/usr/bin/env bash
# From a clone to a GPT with Native Sparse Attention that has learned something, on a machine without an accelerator.
# A second run skips what is done. Arguments are overrides of the job file, such as training.train_iters=50; with any,
# the training runs anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

run_dir=runs/quickstart
data=data/python

printf '\n== 1/4  the environment, in .venv\n'
make_environment .venv
PATH="$PWD/.venv/bin:$PATH"

printf '\n== 2/4  the text: the sources of the standard library of this Python, a byte a token\n'
if [[ -f $data.json ]]; then
  echo "$data is there"
else
  mindspeed-nsa prepare --python-sources --output-prefix "$data"
fi

printf '\n== 3/4  training, on two processes with tensor and sequence parallelism (configs/quickstart.yaml)\n'
if [[ $# -eq 0 && -f $run_dir/sample.txt ]]; then
  echo "$run_dir is there; remove it to train again"
else
  rm -f "$run_dir/sample.txt"
  # Megatron-core warns a screenful about what only a GPU has.
  PYTHONWARNINGS=ignore::UserWarning,ignore::FutureWarning \
    torchrun --standalone --nproc-per-node 2 -m mindspeed_nsa.pretrain --config configs/quickstart.yaml \
      "logging.run_dir=$run_dir" "$@"
fi

printf '\n== 4/4  what was learned\n'
mindspeed-nsa summary "$run_dir"
mindspeed-nsa plot "$run_dir" --output "$run_dir/loss.png" > /dev/null
cat << END

The run lies in $run_dir: metrics.jsonl, TensorBoard's files, and the loss curve in loss.png.
What to try next, after 'source .venv/bin/activate':
  the same model with dense attention, and both curves in one picture
    torchrun --standalone --nproc-per-node 2 -m mindspeed_nsa.pretrain --config configs/quickstart.yaml \\
      nsa.enabled=false logging.run_dir=runs/dense
    mindspeed-nsa plot $run_dir runs/dense --output runs/compare.png
  gates and chosen blocks of every layer
    tensorboard --logdir runs
  your own text
    mindspeed-nsa prepare FOLDER --output-prefix data/mine
    bash launch/quickstart.sh data.data_path=data/mine_train data.valid_data_path=data/mine_valid
END
