#!/bin/sh
# Builds each prompt from several columns: {name} stands for a column of the input file.
set -eu
cd "$(dirname "$0")/.."
mkdir -p demo

.venv/bin/batchrun submit examples/prompts.parquet \
    --template 'Category: {category}. Shorten this request to five words: {prompt}' \
    --chat --max-tokens 16 --limit 8 --output demo/short.jsonl --overwrite
cat demo/short.jsonl
