#!/usr/bin/env bash
# Install what the tests need beyond Python, from Debian's or Ubuntu's packages: a real Slurm, with the database behind
# sacct, Open MPI and MPICH, what makes network namespaces into hosts that ssh and pdsh reach, and a shell that is not sh.
# Where that is not possible it says so and exits 0; the tests then skip, or fail under HPCDS_REQUIRE_SLURM=1.
set -uo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# openmpi-bin also brings the libraries that mpi4py and srun --mpi=pmix load. Where MPICH is installed too, mpirun is
# still Open MPI's: Debian's alternatives prefer it.
declare -A programs_of=([slurm-wlm]="slurmctld slurmd sbatch srun" [munge]="munged" [openmpi-bin]="mpirun"
    [mariadb-server]="mariadbd mariadb-install-db" [slurmdbd]="slurmdbd" [mpich]="mpiexec.mpich mpiexec.hydra"
    [openssh-server]="sshd" [openssh-client]="ssh ssh-keygen" [pdsh]="pdsh" [iproute2]="ip" [fish]="fish")

missing=()
for package in slurm-wlm munge openmpi-bin mariadb-server slurmdbd mpich openssh-server openssh-client pdsh iproute2 fish; do
    for program in ${programs_of[$package]}; do
        command -v "$program" >/dev/null || { missing+=("$package"); break; }
    done
done

give_up() {
    echo "system packages: ${missing[*]} not installed: $1"
    exit 0
}

if ((${#missing[@]} == 0)); then
    echo "system packages: everything is there"
    exit 0
fi
command -v apt-get >/dev/null || give_up "no apt-get on this machine"
as_root=()
if ((EUID != 0)); then
    sudo -n true 2>/dev/null || give_up "needs root, or sudo without a password"
    as_root=(sudo -n)
fi
echo "system packages: installing ${missing[*]} with apt-get"

# The tests start their own daemons; the packages must not start theirs.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
fi

apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@"
}

for attempt in 1 2 3; do
    ((attempt == 1)) || sleep 5
    apt update # a repository that fails here need not be the one that has the packages
    apt install -y --no-install-recommends "${missing[@]}" && exit 0
done
give_up "apt-get failed three times"
