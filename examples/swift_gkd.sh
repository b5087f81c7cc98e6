#!/usr/bin/env bash
# Visual gradient steering in ms-swift 4.6, on its GKD trainer: full parameters; for an adapter add --tuner_type lora.
#
#   examples/swift_gkd.sh STUDENT TEACHER ROWS.jsonl OUTPUT_DIR [further flags of swift]
#
# Rows as swift has them: {"messages": [{"role": "user", "content": "<image>How many?"}], "images": ["0.png"]}.
# Several GPUs of one machine: NPROC_PER_NODE=8 before the command.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 STUDENT TEACHER ROWS.jsonl OUTPUT_DIR [flags of swift]" >&2; exit 2; }
student=$1 teacher=$2 rows=$3 output=$4
shift 4
exec swift rlhf --rlhf_type gkd --external_plugins "$(dirname "$0")/swift_plugin.py" \
  --model "$student" --teacher_model "$teacher" --dataset "$rows" --output_dir "$output" \
  --lmbda 1.0 --beta 1.0 --temperature 1.0 \
  --max_completion_length 2048 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
  --tuner_type full --freeze_vit false --learning_rate 1e-6 --lr_scheduler_type constant --torch_dtype bfloat16 "$@"
