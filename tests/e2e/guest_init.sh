#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# The guest's only process beside whole_disk. The kernel's command line says what it
# is to do to which disks (e2e_rewrite=vd?), one after the other. A rescued guest gets
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
        e2e_rewrite=* | e2e_sprinkle=*)
            task=${word%%=*}
            task=${task#e2e_}
            disks=${word#*=}
            ;;
    esac
done

cd /dev
failed=0
for disk in $disks; do
    echo "e2e: $disk: $task"
    /whole_disk "$task" "$disk" || failed=$((failed + 1))
done
echo "e2e: done, $failed failed"
while :; do
    /bin/busybox sleep 1000
done
