#!/usr/bin/env bash
# Build the arm64 image for real and use it: import the stacks, score one window, start the agent, ask its status.
#
# Needs root on Debian 12 or newer; on another architecture it all runs under qemu-user. No container engine.
#   EXTRAS='[train]'   builds it with torch, and trains one epoch inside
#   PYTHON=…           an interpreter with the project's [train] extra, which makes the model (default .venv/bin/python)
#   WORK=…             a folder of about 4 GB (default build/arm64); the base system in it is made once
#   KEEP=1             leaves the image there: buildah --root WORK/storage --runroot WORK/run images
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=${EXTRAS-}
PYTHON=${PYTHON:-.venv/bin/python}
WORK=$(realpath -m "${WORK:-build/arm64}")
MIRROR=${MIRROR:-http://deb.debian.org/debian}
IMAGE=localhost/tundish:arm64
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot

say() { echo "arm64: $*" >&2; }
fail() { say "$*"; exit 1; }

[ "$(id -u)" = 0 ] || fail "this needs root: it makes a Debian system and registers an interpreter for arm64"
"$PYTHON" -c 'import torch' || fail "$PYTHON has no torch to make the model with; run make demo or set PYTHON"

install() {
  apt-get update -q >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >&2
}
missing=()
for tool in mmdebstrap arch-test buildah; do
  dpkg-query -W -f '${Status}' "$tool" 2>/dev/null | grep -q 'ok installed' || missing+=("$tool")
done
[ ${#missing[@]} -eq 0 ] || install "${missing[@]}"

mkdir -p "$WORK"
finish() {
  [ ! -e "$formats/$entry" ] || echo -1 >"$formats/$entry"
  [ -n "${KEEP-}" ] || rm -rf "$WORK/storage" "$WORK/run"
}
formats=/proc/sys/fs/binfmt_misc
entry=tundish-arm64
trap finish EXIT

# Elsewhere than on arm64 the kernel hands arm64 programs to qemu, 10 or newer: onnxruntime 1.28 and newer crash under
# Debian 12's qemu 7.2 as they are loaded. Debian 12 has qemu 10 in its backports; it is unpacked, not installed.
if [ "$(uname -m)" != aarch64 ]; then
  qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
  if [ -z "$qemu" ] || ! "$qemu" --version | grep -qE 'version [1-9][0-9]\.'; then
    qemu=$WORK/qemu/usr/bin/qemu-aarch64
    if [ ! -x "$qemu" ]; then
      say "fetching qemu 10"
      mkdir -p "$WORK/apt/lists/partial"
      chmod -R a+rX "$WORK/apt"
      echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR bookworm-backports main" \
        >"$WORK/apt/sources.list"
      apt=(apt-get -q -o "Dir::Etc::sourcelist=$WORK/apt/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$WORK/apt/lists" -o APT::Sandbox::User=root)
      "${apt[@]}" update >&2
      (cd "$WORK/apt" && "${apt[@]}" download qemu-user/bookworm-backports >&2)
      dpkg -x "$WORK"/apt/qemu-user_*.deb "$WORK/qemu"
    fi
  fi
  say "$("$qemu" --version | head -n 1)"
  [ -e $formats/register ] || mount -t binfmt_misc binfmt_misc $formats
  [ ! -e $formats/$entry ] || echo -1 >$formats/$entry
  # The latest entry is asked first; F opens the interpreter now, so that it is found from inside a chroot.
  magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  printf '%s' ":$entry:M::$magic:$mask:$qemu:F" >$formats/register
fi
arch-test arm64 >&2 || fail "arm64 programs don't run here"

if [ ! -s "$WORK/base.tar" ]; then
  say "making a Debian 12 base system"
  mmdebstrap --variant=minbase --architectures=arm64 --include=ca-certificates bookworm "$WORK/base.partial.tar" "$MIRROR"
  mv "$WORK/base.partial.tar" "$WORK/base.tar"
fi

# Storage of its own, so that nothing is left in the machine's.
rm -rf "$WORK/storage" "$WORK/run"
buildah() { command buildah --root "$WORK/storage" --runroot "$WORK/run" "$@"; }
base=$(buildah from --arch arm64 scratch)
buildah add -q "$base" "$WORK/base.tar" / >&2
buildah commit -q --rm "$base" localhost/debian-arm64:12 >&2

# What this machine's pip needs to reach its index, the build needs too: its configuration, certificates and address.
options=()
for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  [ ! -f "$file" ] || options+=(--volume "$file:$file:ro")
done
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
  [ -z "${!name-}" ] || options+=(--build-arg "$name=${!name}")
done
say "building $IMAGE (EXTRAS='$EXTRAS')"
buildah bud --arch arm64 --format docker --build-arg BASE=localhost/debian-arm64:12 --build-arg "EXTRAS=$EXTRAS" \
  "${options[@]}" -f Dockerfile.arm64 -t "$IMAGE" . >&2
say "$(buildah images --format '{{.Name}}:{{.Tag}} {{.Size}}' "$IMAGE")"

say "making a model on $(uname -m)"
probe=$WORK/probe
rm -rf "$probe"
mkdir -p "$probe/etc"
cp tests/arm64_probe.py "$probe"
PYTHONPATH=. "$PYTHON" "$probe/arm64_probe.py" write "$probe"
cat >"$probe/etc/gateway.toml" <<'TOML'
[gateway]
path = "acme/lyon/press/line4/cell2"

[mqtt]
url = "mqtt://127.0.0.1:1"

[[source]]
name = "plc"
driver = "opcua"
url = "opc.tcp://127.0.0.1:1"
tags = "plc.csv"

[[source]]
name = "drive"
driver = "modbus"
url = "modbus+tcp://127.0.0.1:1"
tags = "drive.csv"
TOML
printf 'tag,address\nTemp,ns=2;s=Temp\n' >"$probe/etc/plc.csv"
printf 'tag,address,type\nrms,holding:0,uint16\n' >"$probe/etc/drive.csv"
chmod -R a+rX "$probe"

box=$(buildah from --arch arm64 --pull-never "$IMAGE")
inside() { buildah run --volume "$probe:/probe:ro" --volume "$probe/etc:/etc/tundish:ro" "$box" -- "$@"; }
config=(-c /etc/tundish/gateway.toml)

say "who runs it: $(inside id)"
say "edge check, with a board's caps"
inside tundish edge check "${config[@]}" --profile generic-arm64
say "scoring one window inside"
inside python3 -P /probe/arm64_probe.py score /probe
say "starting the agent inside (its PLCs and its broker are out of reach), then the health check"
inside sh -c '
  tundish edge run -c /etc/tundish/gateway.toml --state /var/lib/tundish &
  agent=$!
  for i in 1 2 3 4 5 6 7 8 9 10 11 12; do
    sleep 5
    if tundish edge status -c /etc/tundish/gateway.toml --state /var/lib/tundish; then
      kill -TERM $agent
      wait $agent
      exit $?
    fi
  done
  kill -KILL $agent
  exit 1'
say "ok: built, imported, scored and started on arm64"
