#!/usr/bin/env bash
# Start the run on both nodes, from the same folder on a shared disk (or with the same data and models on each):
#
#   first node:   NODE_RANK=0 MAIN_ADDRESS=10.0.0.1 examples/two_nodes.sh
#   second node:  NODE_RANK=1 MAIN_ADDRESS=10.0.0.1 examples/two_nodes.sh
#
# MAIN_ADDRESS is the first node's, as the second one reaches it. Flags are passed on to `vgs train`, so a killed run is
# continued by the same two commands with `--resume_from_checkpoint true`.
set -euo pipefail

exec accelerate launch \
    --config_file "$(dirname "$0")/two_nodes.yaml" \
    --machine_rank "${NODE_RANK:?set it to 0 on the first node and 1 on the second}" \
    --main_process_ip "${MAIN_ADDRESS:?set it to the address of the first node}" \
    --main_process_port "${MAIN_PORT:-29500}" \
    -m vgs_distill train --config "$(dirname "$0")/qwen3vl_full.yaml" "$@"
