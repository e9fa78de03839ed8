# One case of harm on one side, in the lab: `case.sh CASE without|with SECONDS`. Nothing that is waited for takes longer than
# SECONDS. Prints what was measured, a name and a number a line, then the library's report, each line after the word
# `report`; what the VMM and the library said goes to standard error.
#
# The guest is the firmware, which looks for something to boot and finds nothing: that shows that memory works, and what is
# looked at is the VMM.

row=$1
side=$2
patience=$3
work=/run/harm
group=/sys/fs/cgroup/harm
enter=

# Starts the VMM with these arguments, its monitor behind descriptor 7. Where `$enter` is set, that program runs it.
start() {
    rm -rf $work
    mkdir -p $work
    mkfifo $work/in
    : >$work/out
    exec 7<>$work/in
    set -- /vmm/bin/qemu-system-x86_64 -L /vmm/share -accel kvm -nodefaults -display none -no-reboot \
        -chardev file,id=firmware,path=$work/firmware -device isa-debugcon,iobase=0x402,chardev=firmware -qmp stdio "$@"
    if [ $side = with ]; then
        set -- /vmm/bin/premap exec --report $work/report -- "$@"
    fi
    LD_LIBRARY_PATH=/vmm/lib $enter "$@" <$work/in >>$work/out 2>$work/said 7>&- &
    vmm=$!
}

is_alive() {
    grep -qs '^State:.[^ZX]' /proc/$vmm/status
}

# Waits until a command succeeds. Fails where the VMM ends before, or it takes too long.
until_true() {
    deadline=$(($(now) + patience * 1000))
    until "$@"; do
        is_alive && [ $(now) -lt $deadline ] || return 1
        sleep 0.02
    done
}

has_booted() {
    grep -qs 'No bootable device' $work/firmware
}

has_ended() {
    ! is_alive
}

answers() {
    grep -c '"return"\|"error"' $work/out
}

has_answered() {
    [ $(answers) -gt $answered ]
}

# Has the VMM do something, and waits until it says that it is done.
ask() {
    answered=$(answers)
    echo "{\"execute\":\"$1\"}" >&7
    until_true has_answered && ! grep '"error"' $work/out >&2
}

# Milliseconds, in hundredths of a second.
now() {
    read -r up idle </proc/uptime
    echo ${up%.*}${up#*.}0
}

resident() {
    kib=$(sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' /proc/$vmm/status)
    echo $((${kib:-0} * 1024))
}

on_disk() {
    echo $(($(stat -c %b "$1") * 512))
}

is_mapping() {
    [ $(resident) -gt $((128 << 20)) ]
}

# Lets the guest go on that was held back, and says when its memory is being mapped.
begin() {
    ask qmp_capabilities
    ask cont
    if [ $side = with ]; then
        until_true is_mapping
    else
        sleep 0.5
    fi
    echo "resident_bytes $(resident)"
    began=$(now)
}

case $row in
memory_cgroup)
    mkdir -p $group
    echo 200M >$group/memory.max
    printf '#!/bin/sh\necho 0 >%s/cgroup.procs\nexec "$@"\n' $group >/run/enter
    chmod +x /run/enter
    enter=/run/enter
    start -m 1G
    until_true has_booted && sleep 2
    echo "peak_bytes $(cat $group/memory.peak)"
    ;;
virtio_mem)
    start -m 256M,maxmem=2G -object memory-backend-ram,id=pool,size=1G \
        -device virtio-mem-pci,memdev=pool,requested-size=0
    until_true has_booted && sleep 2
    echo "resident_bytes $(resident)"
    ;;
full_tmpfs)
    mkdir -p /run/full
    mount -t tmpfs -o size=32M full /run/full || exit 2
    start -m 1G -object memory-backend-file,id=memory,mem-path=/run/full/memory,size=1G,share=on \
        -machine memory-backend=memory
    until_true has_booted && sleep 2
    ;;
sparse_file)
    mkdir -p /run/disk
    truncate -s 400M /run/disk.img
    mke2fs -F /run/disk.img >/dev/null
    mount -o loop /run/disk.img /run/disk || exit 2
    start -m 256M -object memory-backend-file,id=memory,mem-path=/run/disk/memory,size=256M,share=on \
        -machine memory-backend=memory
    until_true has_booted && sleep 2
    sync
    echo "disk_bytes $(on_disk /run/disk/memory)"
    ;;
paused)
    start -m 1G -S
    begin
    ask stop && echo "stop_ms $(($(now) - began))"
    ;;
quit)
    start -m 1G -S
    begin
    echo '{"execute":"quit"}' >&7
    until_true has_ended
    echo "ended_ms $(($(now) - began))"
    ;;
terminated)
    start -m 1G -S
    begin
    kill -TERM $vmm
    until_true has_ended
    echo "ended_ms $(($(now) - began))"
    ;;
*)
    echo "no case $row" >&2
    exit 2
    ;;
esac

if is_alive; then
    echo "alive 1"
    kill -KILL $vmm
    wait $vmm
else
    echo "alive 0"
    wait $vmm
    echo "exit $?"
fi
has_booted && echo "booted 1" || echo "booted 0"
sed 's/^/report /' $work/report 2>/dev/null
cat $work/said >&2
exec 7>&-
case $row in
memory_cgroup) rmdir $group ;;
full_tmpfs) umount /run/full ;;
sparse_file) umount /run/disk && rm /run/disk.img ;;
esac
exit 0
