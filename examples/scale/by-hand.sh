#!/usr/bin/env bash
# Runs one job on this machine and on others that ssh reaches, and stops Ray again at the end:
#
#     INPUT=prompts.parquet OUTPUT=answers.parquet WORKERS=8 ./by-hand.sh [HOST...] [-- OPTION...]
#
# OPTIONs are those of `batchrun submit`, such as --model. RESUME=JOB continues a job instead.
set -euo pipefail

INPUT=${INPUT:-prompts.parquet}
OUTPUT=${OUTPUT:-answers.parquet}
WORKERS=${WORKERS:-1}
GPUS_PER_WORKER=${GPUS_PER_WORKER:-1}
BIN=${BIN:-$(dirname "$(command -v ray)")} # has ray and batchrun, on every machine
PORT=${PORT:-6379}

hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do hosts+=("$1") && shift; done
[ $# -eq 0 ] || shift

HEAD=${HEAD:-127.0.0.1} # this machine's address, as the others reach it
if [ ${#hosts[@]} -gt 0 ] && [ "$HEAD" = 127.0.0.1 ]; then
    HEAD=$(hostname -I | cut -d ' ' -f 1)
fi

if (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
    echo "port $PORT is in use, perhaps by another Ray cluster: set PORT" >&2
    exit 1
fi

# A token for this cluster alone: whoever can run code on it must know it.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

links=() shells=()

# start_ray OPTIONS [SSH HOST]: `ray start`, until this script ends, however it ends. The other end
# of a pipe sees even a SIGKILL. `ray stop` would stop all of the user's clusters on a machine.
start_ray() {
    local options=$1 link
    shift
    exec {link}> >(trap '' INT && exec "$@" bash -s) # a Ctrl-C is for batchrun's view
    links+=("$link") shells+=("$!")
    # Through the pipe: a command line, with the token in it, is visible to all. Ray opens its folder,
    # in which rows may be spilled, to all users; one around it is private.
    cat >&"$link" <<END
{
    export PATH='$BIN':"\$PATH" RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
    umask 077
    folder=\$(mktemp -d /tmp/ray-XXXXXX)
    ray start $options --temp-dir="\$folder/ray" --block </dev/null >/dev/null &
    ray=\$!
    cat <&0 >/dev/null &
    wait -n
    if kill \$ray 2>/dev/null; then wait \$ray; rm -rf "\$folder"; else kill \$!; fi
    exit
}
END
}

stop_ray() {
    local link shell
    for link in "${links[@]}"; do exec {link}>&-; done
    for shell in "${shells[@]}"; do
        while kill -0 "$shell" 2>/dev/null; do sleep 0.1; done
    done
}
trap stop_ray EXIT

start_ray "--head --node-ip-address=$HEAD --port=$PORT --include-dashboard=false"
until (: <"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do
    kill -0 "${shells[0]}" 2>/dev/null # else Ray has ended, and said why
    sleep 0.2
done
for host in "${hosts[@]}"; do
    start_ray "--address=$HEAD:$PORT" ssh -o BatchMode=yes "$host"
done

export RAY_ADDRESS=$HEAD:$PORT PATH=$BIN:$PATH # the cluster that `--ray auto` means
if [ -n "${RESUME:-}" ]; then
    command=(batchrun resume "$RESUME" --wait)
else
    command=(batchrun submit "$INPUT" --output "$OUTPUT" --ray auto
        --workers "$WORKERS" --gpus-per-worker "$GPUS_PER_WORKER" --wait "$@")
fi
status=0
(
    for link in "${links[@]}"; do exec {link}>&-; done # only this script keeps Ray alive
    exec "${command[@]}"
) || status=$?
if [ $status -eq 130 ]; then # Ctrl-C left the view; the job would go on without its cluster
    batchrun cancel || true
fi
exit $status
