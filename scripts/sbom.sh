#!/usr/bin/env bash
# Write build/sbom.cdx.json: the packages of .venv (the lock's, and the demo's) as CycloneDX: `make sbom`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
.venv/bin/python -m uv tool run --quiet --with-requirements image/sbom.txt --from cyclonedx-bom \
  cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o build/sbom.cdx.json .venv/bin/python
echo build/sbom.cdx.json
