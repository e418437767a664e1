#!/bin/sh
# One step of the image's build: /opt/venv with what pyproject.toml asks for (without `dev`) in the lock's versions, a
# CycloneDX list of it, then slim.py. The argument is the target, cpu or gpu: which build of torch.
set -eu
tools=/opt/tools
python3 -m venv --without-pip /opt/venv
"$tools/bin/uv" pip install --config-file "$tools/$1.toml" --python /opt/venv/bin/python \
  -r /wanted/pyproject.toml --extra all -c /requirements.lock
"$tools/bin/cyclonedx-py" environment --output-reproducible --pyproject /wanted/pyproject.toml \
  -o /opt/sbom.cdx.json /opt/venv/bin/python
/opt/venv/bin/python "$tools/slim.py" /opt/venv
echo /opt/select-moe > "$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/select-moe.pth"
