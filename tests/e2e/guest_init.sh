#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# The guest's only process beside whole_disk. The kernel's command line says what it
# is to do to which disks (e2e_rewrite=vd?, or one of the others below), one after the other. A rescued guest gets
# Nova's own command line, and only checks all of its disks.

/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1

while read -r module; do
    /bin/busybox insmod "/modules/$module"
done </modules/order

task=check
disks=vd?
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in
        e2e_rewrite=* | e2e_sprinkle=* | e2e_give_back=*)
            task=${word%%=*}
            task=${task#e2e_}
            disks=${word#*=}
            ;;
    esac
done

# As a guest does in a night: new filesystems, whose tables the kernel zeroes from some
# seconds after the mount on, files that come and go, and all that is free given back.
give_back() {
    for round in 1 2; do
        /programs/mke2fs -q -F -t ext4 "/dev/$1" &&
            /bin/busybox mount -t ext4 -o init_itable=0 "/dev/$1" /mnt &&
            /bin/busybox dd if=/dev/urandom of=/mnt/data bs=1M count=16 2>/dev/null &&
            /bin/busybox dd if=/dev/zero of=/mnt/zeros bs=1M count=16 2>/dev/null &&
            /bin/busybox sync &&
            /programs/fallocate --dig-holes /mnt/zeros &&
            /bin/busybox rm /mnt/data &&
            /programs/fstrim /mnt &&
            /bin/busybox sleep 10 &&
            /bin/busybox umount /mnt || return
    done
}

cd /dev
failed=0
for disk in $disks; do
    echo "e2e: $disk: $task"
    if [ "$task" = give_back ]; then
        give_back "$disk"
    else
        /whole_disk "$task" "$disk"
    fi || failed=$((failed + 1))
done
echo "e2e: done, $failed failed"
while :; do
    /bin/busybox sleep 1000
done
