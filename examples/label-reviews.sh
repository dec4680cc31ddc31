#!/usr/bin/env bash
# Labels a table of reviews: a prompt is made of each row, and the answer stands beside the row's own columns in labels.csv.
# MODEL is the model; run it again after Ctrl-C or a crash, and it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")"
zeroinf run --model "${MODEL:-demo}" \
    -i reviews.csv --template @review.j2 --chat --keep-columns text,stars \
    --max-new-tokens 4 -o labels.csv --resume
