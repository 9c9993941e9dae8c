#!/usr/bin/env bash
# PID 1 of a virtual node: own network, host name, mounts, processes and shared memory.
#   node.sh ROOT NAME
# Its end is a power cut.  USR1 starts slurmd again after it was killed.
set -euo pipefail
root=$1 name=$2
export SLURM_CONF=$root/etc/slurm.conf
hostname "$name"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
touch "$root/run/$name.ready"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add "10.88.0.${name#node}/24" dev eth0
ip link set eth0 up
begin() { slurmd -D -N "$name" >>"$root/log/slurmd.$name.out" 2>&1 & }
trap begin USR1
begin
while :; do
    sleep 3600 &
    wait $! || true
done
