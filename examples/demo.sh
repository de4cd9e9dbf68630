#!/usr/bin/env bash
# What attnopt does, on the two bundled checkpoints: inspect, explain, rewrite exactly, halve a cache,
# remove a fifth of the parameters.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf out/code-llama-half out/code-llama-half-onnx out/code-llama-pruned

show() {
    printf '$ %s\n' "$*"
    "$@"
    echo
}

show attnopt inspect examples/models/code-llama
show attnopt inspect examples/models/vit-digits
show attnopt explain examples/models/code-llama model.layers.0.self_attn
show python examples/exact_parity.py examples/models/code-llama examples/models/vit-digits
show attnopt optimize examples/models/code-llama -o out/code-llama-half --kv-cache 50% --max-drop 10%
show python examples/greedy.py examples/models/code-llama out/code-llama-half --compiled
show attnopt export out/code-llama-half --to onnx -o out/code-llama-half-onnx
show attnopt optimize examples/models/code-llama -o out/code-llama-pruned --params 80% --max-drop 10%
