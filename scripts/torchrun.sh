#!/usr/bin/env bash
# Train with a recipe on the GPUs of this machine, or of several:
#   scripts/torchrun.sh configs/sent_1.5b.yaml [further options of fit]
# DEVICES (default: all GPUs) is the number of processes here. On each of NODES machines, with the same HEAD:
#   NODES=2 RANK=0 HEAD=10.0.0.1:29500 scripts/torchrun.sh configs/sent_14b.yaml
set -euo pipefail
config=${1:?usage: scripts/torchrun.sh CONFIG [options of fit]}
shift
devices=${DEVICES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
nodes=${NODES:-1}
where=(--standalone)
if ((nodes > 1)); then
    where=(--node-rank "${RANK:?set RANK, 0 to NODES - 1}" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?set HEAD to HOST:PORT}")
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$devices" "${where[@]}" -m lightning_rlvr fit --config "$config" \
    --trainer.devices "$devices" --trainer.num_nodes "$nodes" "$@"
