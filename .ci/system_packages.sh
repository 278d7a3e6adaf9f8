#!/usr/bin/env bash
# What rendering needs from a Debian or Ubuntu system. As root it is installed, else named.
#
#   .ci/system_packages.sh egl    pictures of dm_control, without a screen
#   .ci/system_packages.sh glu    pictures of the Duckietown simulator
set -euo pipefail
[ "$(uname)" = Linux ] || exit 0  # elsewhere the system brings its own OpenGL

PATH="$PATH:/sbin:/usr/sbin"
case "${1:-}" in
  egl)
    libraries='libEGL\.so\.1 libGL\.so\.1 libEGL_mesa|libEGL_nvidia'
    packages="libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"
    ;;
  glu)
    libraries='libGLU\.so\.1'
    packages="libglu1-mesa"
    ;;
  *)
    echo "usage: $0 egl|glu" >&2
    exit 2
    ;;
esac

present=$(ldconfig -p)
complete=yes
for library in $libraries; do
  grep -qE "$library" <<< "$present" || complete=no
done
[ $complete = no ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  apt-get update -qq
  # shellcheck disable=SC2086  # a list of packages
  apt-get install -y -qq $packages
else
  echo "error: rendering needs system packages; run: sudo apt-get install $packages" >&2
  exit 1
fi
