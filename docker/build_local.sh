#!/usr/bin/env bash
# Builds an image where there is neither Docker nor a registry of images: with buildah, on a Debian
# that debootstrap makes. As root:
#
#   apt-get install buildah debootstrap
#   docker/build_local.sh [cpu|gpu] [OPTION OF buildah bud...]
#   docker/build_local.sh run [COMMAND...]        what `docker run rayprism:local COMMAND` would do
#
# pip is told what this machine's /etc/pip.conf says. Where that names folders, add them, as in
# --volume /opt/wheels:/opt/wheels:ro.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm
BASE=localhost/rayprism-base:$SUITE
BUILDAH=(buildah --storage-driver vfs)
# The machine's own certificates, so that its package registries are trusted in the build too.
CERTIFICATES=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)

make_base() {
  local folder
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  # As the official image: a small Debian with Python and pip.
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip "$SUITE" \
    "$folder" ${MIRROR:+"$MIRROR"}
  rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
  local container
  container=$("${BUILDAH[@]}" from scratch)
  "${BUILDAH[@]}" add --quiet "$container" "$folder" / >/dev/null
  "${BUILDAH[@]}" commit --quiet --rm "$container" "$BASE" >/dev/null
}

build() {
  local target=$1 secrets=()
  shift
  "${BUILDAH[@]}" inspect --type image "$BASE" >/dev/null 2>&1 || make_base
  if [ -r /etc/pip.conf ]; then
    secrets=(--secret id=pip,src=/etc/pip.conf)
  fi
  # Without layers: this storage copies the whole image for each.
  "${BUILDAH[@]}" bud --isolation chroot --layers=false --format docker \
    --build-arg "BASE=$BASE" "${CERTIFICATES[@]}" "${secrets[@]}" \
    --file docker/Dockerfile --target "$target" --tag "localhost/rayprism-$target:local" "$@" .
}

run() {
  local container status=0
  container=$("${BUILDAH[@]}" from localhost/rayprism-cpu:local)
  # buildah knows of no entry point when it runs something.
  "${BUILDAH[@]}" run --isolation chroot "$container" -- tini -- rayprism-entrypoint "$@" || status=$?
  "${BUILDAH[@]}" rm "$container" >/dev/null
  return $status
}

case "${1:-cpu}" in
run) run "${@:2}" ;;
cpu | gpu) build "${1:-cpu}" "${@:2}" ;;
*)
  echo "build_local.sh: say cpu, gpu or run, not $1" >&2
  exit 2
  ;;
esac
