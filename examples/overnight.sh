#!/usr/bin/env bash
# Queue several runs for a night. A run that fails does not stop the next one; a run that was stopped by a signal (exit
# code 75) is given again, and goes on where it was. With a time limit (LOPT_LITE_DEADLINE=07:00 or LOPT_LITE_MAX_HOURS=8
# in the environment, or the options of these names in a line of the queue or in its --config file), 75 ends the queue:
# the night is over.
#
#     nohup examples/overnight.sh > overnight.log 2>&1 &
#
# Stop the queue itself with: kill PID (the run that is going on saves a checkpoint; this script again continues it).
set -uo pipefail

MODEL=${MODEL:-.demo/SmolLM2-135M-Instruct/model.safetensors}
DATA=${DATA:-examples/gsm8k_train.jsonl}
LOPT_LITE=${LOPT_LITE:-lopt-lite}
MOST_TRIES=${MOST_TRIES:-20}

stop_asked=0
child=
trap 'stop_asked=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' INT TERM

failed=()

has_time_limit() {
    local before='' file word
    local time_limit='^[[:space:]{]*["'\'']?-*(deadline|max[-_]hours)["'\'']?[[:space:]]*:[[:space:]]*[^[:space:]#n~]'
    [ -n "${LOPT_LITE_DEADLINE:-}${LOPT_LITE_MAX_HOURS:-}" ] && return 0
    for word in "$@"; do
        file=
        case "$word" in
            --deadline* | --max-hours*) return 0 ;;
            --config=*) file=${word#--config=} ;;
            *) [ "$before" = --config ] && file=$word ;;
        esac
        [ -f "$file" ] && grep -Eq "$time_limit" "$file" && return 0
        before=$word
    done
    return 1
}

train() {
    local name=$1 tries=0 code
    shift
    while true; do
        tries=$((tries + 1))
        echo "== $name, try $tries, $(date '+%F %T')"
        "$LOPT_LITE" train "$MODEL" "$DATA" --output "runs/$name" --validation 0.05 "$@" &
        child=$!
        wait "$child"
        code=$?
        # A signal ends the first wait early; the run then needs a moment for its checkpoint.
        while kill -0 "$child" 2>/dev/null; do
            wait "$child"
            code=$?
        done
        child=
        [ "$stop_asked" -eq 1 ] && { echo "== stopped in $name (exit code $code)"; exit 75; }
        # Given again, the run would go on until the next morning: a deadline is the next time that a clock shows it.
        [ "$code" -eq 75 ] && has_time_limit "$@" &&
            { echo "== stopped on time in $name; this script again continues it"; exit 75; }
        [ "$code" -eq 75 ] && [ "$tries" -lt "$MOST_TRIES" ] && continue
        break
    done
    if [ "$code" -ne 0 ]; then
        echo "== $name failed with exit code $code"
        failed+=("$name ($code)")
    fi
}

# The queue: a name for the run directory, then the options that differ.
train rank-16 --lora-r 16
train rank-64 --lora-r 64
train end-to-end --blocks 1
train slow-and-long --lr 1e-4 --epochs 3

echo "== the night is over, $(date '+%F %T')"
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
