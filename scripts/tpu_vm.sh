#!/usr/bin/env bash
# The same run on every host of a Cloud TPU slice, whatever their number; docs/tpu.md tells how to use it.
#
#   NAME=tpu ZONE=us-east5-b scripts/tpu_vm.sh --config=dpo --workdir=gs://BUCKET/runs/dpo [--config.key=value ...]
#
# What this checkout holds is copied to the hosts and installed there, then the run is started on all of them. Its
# output comes back here, that of process 0 and the first error of any other.
set -euo pipefail
: "${NAME:?the name of the TPU VM}" "${ZONE:?its zone}"

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

archive=$(mktemp -d)/dpojax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
git -C "$(dirname "$0")/.." archive --format=tar.gz --prefix=dpojax/ --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:dpojax.tar.gz" --zone="$ZONE" --worker=all
on_all_hosts "tar -xzf dpojax.tar.gz && python3 -m venv dpojax-env && dpojax-env/bin/pip install -q './dpojax[tpu,gcs]'"
on_all_hosts "dpojax-env/bin/dpojax-train $(printf '%q ' "$@") --config.parallel.coordinator=auto"
