#!/usr/bin/env bash
# Pretrain on Atlas A3 nodes of 16 dies, from a job file: Megatron-LM's pretrain_gpt under MindSpeed. Each node runs this script.
#
#   one node    bash launch/pretrain_a3.sh --config configs/nsa_27b.yaml [section.key=value ...]
#   many        NNODES=8 NODE_RANK=0 MASTER_ADDR=node0 bash launch/pretrain_a3.sh ...      NODE_RANK 0 to 7
#   by file     HOSTFILE=hosts.txt bash launch/pretrain_a3.sh ...                          one host a line, the first is node 0
#   SLURM       srun --nodes=8 --ntasks-per-node=1 bash launch/pretrain_a3.sh ...
#
# --dry-run prints the commands and the environment of each node and starts nothing; --trainer builtin runs this project's
# own trainer, on any machine. The rest is `mindspeed-nsa launch --help` and docs/launch.md.
#
#   MEGATRON_LM_PATH  Megatron-LM, core_v0.12.1 for today's MindSpeed
#   MINDSPEED_PATH    MindSpeed; not needed where it is installed
#   NPUS_PER_NODE     ranks a node; 16 if unset
#   MASTER_PORT       a free port of node 0; 6000 if unset
set -euo pipefail

export NPUS_PER_NODE="${NPUS_PER_NODE:-16}"

# CANN's own variables, where they are not there yet. Its script reads some that need not be set.
cann=/usr/local/Ascend/ascend-toolkit/set_env.sh
if [[ -z ${ASCEND_HOME_PATH:-} && -f $cann ]]; then
  set +u
  # shellcheck source=/dev/null
  source "$cann"
  set -u
fi

# The environment that launch/test.sh makes, if no other one is active.
command -v mindspeed-nsa > /dev/null || PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"

exec mindspeed-nsa launch "$@"
