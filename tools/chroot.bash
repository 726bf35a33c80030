# SPDX-License-Identifier: Apache-2.0
#
# Debian in a folder, for programs that source this, and have root=() or root=(sudo).

# Make one that starts no services: bootstrap SUITE FOLDER [PACKAGE,...]
bootstrap() {
    local suite=$1 folder=$2 packages=${3:-}
    "${root[@]}" rm -rf --one-file-system "$folder" || return
    # In a mount namespace of its own, so that nothing stays mounted if it is killed.
    "${root[@]}" unshare --mount debootstrap --variant=minbase ${packages:+--include="$packages"} \
        "$suite" "$folder" >&2 || return
    # 101: not allowed, by invoke-rc.d's specification.
    printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$folder/usr/sbin/policy-rc.d" >/dev/null || return
    "${root[@]}" chmod 755 "$folder/usr/sbin/policy-rc.d" || return
    "${root[@]}" chroot "$folder" apt-get clean
}

# Run a program as root in one, with this machine's devices, and processes of its own, which
# end with it, as all does that it mounts: within FOLDER SCRATCH PROGRAM [ARGUMENT...]
#
# With a folder SCRATCH what is written goes there, and FOLDER stays as it is; it is
# /scratch within. Without ("") it is written to FOLDER.
within() {
    "${root[@]}" unshare --mount --pid --fork --kill-child bash -euc '
        place=$1 scratch=$2
        shift 2
        if [ -n "$scratch" ]; then
            mkdir -p "$scratch/written" "$scratch/work" "$scratch/root"
            mount -t overlay -o "lowerdir=$place,upperdir=$scratch/written,workdir=$scratch/work" overlay "$scratch/root"
            place=$scratch/root
            mkdir -p "$place/scratch"
            mount --bind "$scratch" "$place/scratch"
        fi
        mount -t proc proc "$place/proc"
        mount --rbind /sys "$place/sys"
        mount --rbind /dev "$place/dev"
        exec chroot "$place" env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
    ' bash "$@"
}
