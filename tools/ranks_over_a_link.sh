#!/usr/bin/env bash
# Ranks of MPI behind network links of a given speed, on one Linux machine, as root:
#     tools/ranks_over_a_link.sh RATE RANKS COMMAND...      (RATE as of tc: 1gbit, 100mbit)
# Each rank has a network namespace of its own, and all of them a bridge; MPICH's mpiexec is taken from the PATH, else
# from .venv. Nothing of it stays.
set -euo pipefail
rate=$1 ranks=$2
shift 2
PATH=$PATH:$(cd "$(dirname "$0")/.." && pwd)/.venv/bin
name=fc$$ folder=$(mktemp -d)
namespaces=$(seq -f "$name-%g" "$ranks")

cleanup() {
    for each in $namespaces; do ip netns delete "$each" 2>/dev/null || true; done
    ip link delete "$name" 2>/dev/null || true
    rm -r "$folder"
}
trap cleanup EXIT

ip link add "$name" type bridge
ip link set "$name" up
for i in $(seq "$ranks"); do
    ip netns add "$name-$i"
    ip link add "${name}v$i" type veth peer name eth0 netns "$name-$i"
    ip link set "${name}v$i" master "$name" up
    ip -n "$name-$i" address add "10.99.0.$i/24" dev eth0
    ip -n "$name-$i" link set eth0 up
    ip -n "$name-$i" link set lo up
    tc -n "$name-$i" qdisc add dev eth0 root tbf rate "$rate" burst 1mb latency 50ms
done

# What mpiexec takes for ssh: [options] host command...
cat > "$folder/enter" <<END
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
host=\$1
shift
exec ip netns exec "$name-\${host##*.}" bash -c "\$*"
END
chmod +x "$folder/enter"
hosts=$(seq -s , -f '10.99.0.%g:1' "$ranks")
UCX_TLS=tcp,self UCX_NET_DEVICES=eth0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ip netns exec "$name-1" \
    mpiexec -launcher ssh -launcher-exec "$folder/enter" -localhost 10.99.0.1 -hosts "$hosts" -n "$ranks" "$@"
