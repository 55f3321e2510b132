#!/usr/bin/env bash
# Builds an image where there is neither Docker nor a registry of images: with buildah, on a Debian
# that debootstrap makes. As root:
#
#   apt-get install buildah debootstrap
#   docker/build_local.sh cpu|gpu [OPTION OF buildah bud...]
#   docker/build_local.sh run [COMMAND...]     what `docker run rayprism COMMAND` would do
#   docker/build_local.sh try REPOSITORY       serves the demo's model from the image, and looks it over
#
# pip is told what this machine's /etc/pip.conf says. Where that names folders, add them, as in
# --volume /opt/wheels:/opt/wheels:ro.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm
BASE=localhost/rayprism-base:$SUITE
IMAGE=localhost/rayprism-cpu:local
BUILDAH=(buildah --storage-driver vfs)

make_base() {
  local folder container
  folder=$(mktemp -d)
  # As the official image: a small Debian with Python and pip.
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip "$SUITE" \
    "$folder" ${MIRROR:+"$MIRROR"}
  rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
  container=$("${BUILDAH[@]}" from scratch)
  "${BUILDAH[@]}" add --quiet "$container" "$folder" / >/dev/null
  "${BUILDAH[@]}" commit --quiet --rm "$container" "$BASE" >/dev/null
  rm -rf "$folder"
}

build() {
  local target=$1 secrets=()
  shift
  "${BUILDAH[@]}" inspect --type image "$BASE" >/dev/null 2>&1 || make_base
  if [ -r /etc/pip.conf ]; then
    secrets=(--secret "id=pip,src=/etc/pip.conf")
  fi
  # Without layers: this storage copies the whole image for each. With the machine's certificates: its
  # package registries are trusted in the build too.
  "${BUILDAH[@]}" bud --isolation chroot --layers=false --format docker \
    --build-arg "BASE=$BASE" --volume /etc/ssl/certs:/etc/ssl/certs:ro "${secrets[@]}" \
    --file docker/Dockerfile --target "$target" --tag "localhost/rayprism-$target:local" "$@" .
}

# run [OPTION OF buildah run...] -- [COMMAND...]
run() {
  local options=() container status=0
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  container=$("${BUILDAH[@]}" from --ulimit "nofile=1024:$(ulimit -Hn)" "$IMAGE")
  # buildah knows of no entry point when it runs something. There tini is not the first process.
  "${BUILDAH[@]}" run --isolation chroot "${options[@]}" "$container" -- \
    tini -s -- rayprism-entrypoint "$@" || status=$?
  "${BUILDAH[@]}" rm "$container" >/dev/null
  return $status
}

try() {
  echo "size      $("${BUILDAH[@]}" images --format '{{.Size}}' "$IMAGE")"
  run --volume "$(realpath "$1"):/models:ro" --volume "$PWD/docker/try.sh:/try.sh:ro" \
    --volume "$PWD/serve_configs/quickstart.yaml:/serve.yaml:ro" \
    --volume "$PWD/examples/flights/rows.json:/rows.json:ro" -- bash /try.sh
}

case "${1:-}" in
cpu | gpu) build "$@" ;;
run) run -- "${@:2}" ;;
try) try "${2:?say where the model repository is}" ;;
*)
  echo "build_local.sh: say cpu, gpu, run or try" >&2
  exit 2
  ;;
esac
