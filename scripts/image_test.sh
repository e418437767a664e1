#!/usr/bin/env bash
# The image's tests: `make image-test`. Where no container engine is, Debian's own is installed (root); the tests start
# it, and debootstrap makes the base image where none can be pulled.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=()
if ! docker version >/dev/null 2>&1; then
  command -v dockerd >/dev/null || wanted+=(docker.io iproute2 iptables)
  command -v debootstrap >/dev/null || wanted+=(debootstrap)
fi
if [ ${#wanted[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "image-test: no container engine answers; start one, or run this as root on Debian to have ${wanted[*]} installed" >&2
    exit 2
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
fi
exec .venv/bin/python -m pytest tests/image -q -n 0 -rs --timeout 2400 "$@"
