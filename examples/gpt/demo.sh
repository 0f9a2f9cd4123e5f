#!/usr/bin/env bash
# Submit the GPT job to this machine, preempt it half way as a cluster would, and watch it resume by itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=$(mktemp -d "${TMPDIR:-/tmp}/hpcds-demo-XXXXXX")

preempt_half_way() {
    until hpcds status gpt --runs "$runs" --json 2>/dev/null | grep -q '"step": 1[0-9][0-9],'; do sleep 1; done
    echo "          >>> hpcds preempt gpt"
    hpcds preempt gpt --runs "$runs" >/dev/null
}

preempt_half_way &
waiting=$!
trap 'kill "$waiting" 2>/dev/null || true' EXIT
hpcds submit examples/gpt/job.json --site local --runs "$runs" --follow
