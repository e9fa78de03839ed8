#!/bin/busybox sh
# The lab's init. It sets the machine up, says "up" on the control port, and then runs each line it gets there.
# The protocol is stated in lab/boot.rs.

export PATH=/lab:/bin HOME=/root
export PREMAP_GUEST_KERNEL=/guest/vmlinuz PREMAP_GUEST_INITRD=/guest/initramfs PREMAP_GUEST_MARKER=premap-guest-is-up
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/null >/dev/console 2>&1
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t debugfs debugfs /sys/kernel/debug
mount -t hugetlbfs hugetlbfs /dev/hugepages
# For tests of what limits do; the private kernel has none of them.
if mount -t cgroup2 cgroup2 /sys/fs/cgroup; then
    for controller in memory pids hugetlb; do
        echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
    done
fi
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
ip link set lo up
hostname lab

for module in /modules/*.ko; do
    # The words of the list are one argument each.
    insmod "$module" $(cat "$module.parameters") || echo "lab: cannot load $module"
done

# A job's streams go through pipes, since a port can be opened once only, and a job may well open /dev/stderr.
job() {
    number=$1
    shift
    rm -f /run/out /run/err
    mkfifo /run/out /run/err
    cat /run/out >&5 &
    out=$!
    cat /run/err >&6 &
    err=$!
    (
        exec 3>&- 5>&- 6>&-
        cd /root
        exec "$@"
    ) </dev/null >/run/out 2>/run/err
    code=$?
    wait $out $err
    printf '%s:%s;' "$token" "$number" >&5
    printf '%s:%s;' "$token" "$number" >&6
    echo "exit $number $code" >&3
}

until [ -c /dev/vport0p3 ]; do
    sleep 0.05
done
exec 3<>/dev/vport0p1 5>/dev/vport0p2 6>/dev/vport0p3
echo up >&3

# Until the first line, an end of file may only mean that the host's side of the port isn't open yet.
tries=100
while :; do
    if read -r line <&3; then
        tries=0
        eval "$(printf '%b' "$line")"
    elif [ $tries -gt 0 ]; then
        tries=$((tries - 1))
        sleep 0.1
    else
        break
    fi
done
poweroff -f
