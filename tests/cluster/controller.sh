#!/usr/bin/env bash
# PID 1 of a virtual cluster: network, munge and slurmctld in namespaces of their own.
#   controller.sh ROOT    with ROOT/etc/slurm.conf and ROOT/etc/hosts written
# It ends, and everything in its namespaces with it, when its standard input is closed: nothing
# outlives the process that started it, and nothing of it is seen outside.
set -euo pipefail
root=$1
export SLURM_CONF=$root/etc/slurm.conf
hostname controller
mount --bind "$root/etc/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
ip link add bridge0 type bridge
ip address add 10.88.0.254/24 dev bridge0
ip link set bridge0 up
head -c 1024 /dev/urandom >"$root/munge/key"
chmod 600 "$root/munge/key"
munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" \
    --pid-file="$root/run/munged.pid" --log-file="$root/log/munged.log" \
    --seed-file="$root/munge/seed"
slurmctld
touch "$root/run/controller.up"
cat >/dev/null
