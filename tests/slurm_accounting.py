"""The database behind ``sacct``: MariaDB and slurmdbd of a private cluster, in its folder, on ports of its own.

The cluster starts and ends the processes; this file knows their files, and the order in which they can be used.

Source: https://slurm.schedmd.com/accounting.html, https://slurm.schedmd.com/slurmdbd.conf.html
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr", "sacct")

USER = "slurm"
ACCOUNT = "lab"

# A database for a few hundred rows: small, and in no hurry to have them on disk.
SMALL = (
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-lock-wait-timeout=900",  # slurmdbd complains about less
    "--performance-schema=OFF",
    "--skip-log-bin",
)


class Accounting:
    """Files and command lines of the two daemons."""

    def __init__(self, folder: Path, database_port: int, slurmdbd_port: int) -> None:
        self._folder = folder
        self._data = folder / "mariadb"
        self._database_port = database_port
        self.port = slurmdbd_port

    @property
    def settings(self) -> dict[str, str]:
        """What slurm.conf says of it."""
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(self.port),
            "AccountingStoragePass": f"{self._folder}/munge.socket",  # with munge, where munged listens
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": "task=5",
        }

    def prepare(self, env: Mapping[str, str]) -> None:
        """Make an empty database with one user, and the configuration of slurmdbd.

        Raises:
            RuntimeError: the database cannot be made.

        """
        user, password = user_name(), secrets.token_hex(16)
        self._data.mkdir()
        install = [
            *self._server("mariadb-install-db", env),
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]
        done = subprocess.run([*install, f"--user={user}"], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"mariadb-install-db: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        first = self._folder / "mariadb.sql"
        first.write_text(
            f"CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
            f"CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            f"GRANT ALL ON slurm_acct_db.* TO '{USER}'@'127.0.0.1';\n"
        )
        first.chmod(0o600)
        self._write_slurmdbd_conf(user, password)

    def database(self, env: Mapping[str, str]) -> list[str]:
        """The command line of the database, which listens on this machine only."""
        return [
            *self._server("mariadbd", env),
            f"--user={user_name()}",
            f"--socket={self._folder}/mariadb.socket",
            f"--pid-file={self._folder}/mariadb.pid",
            f"--init-file={self._folder}/mariadb.sql",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            f"--port={self._database_port}",
            *SMALL,
        ]

    def database_is_up(self) -> bool:
        """Whether the database takes connections."""
        return _listens(self._database_port)

    def slurmdbd_is_up(self) -> bool:
        """Whether slurmdbd takes connections."""
        return _listens(self.port)

    def _server(self, name: str, env: Mapping[str, str]) -> list[str]:
        path = shutil.which(name, path=env["PATH"])
        if path is None:
            raise RuntimeError(f"{name}: not installed; run tests/install_system_packages.sh")
        return [path, "--no-defaults", f"--datadir={self._data}"]

    def _write_slurmdbd_conf(self, user: str, password: str) -> None:
        values = {
            "DbdHost": socket.gethostname().partition(".")[0],
            "DbdAddr": "127.0.0.1",
            "DbdPort": str(self.port),
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._folder}/munge.socket",
            "SlurmUser": user,
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": str(self._database_port),
            "StorageUser": USER,
            "StoragePass": password,
            "StorageLoc": "slurm_acct_db",
            "PidFile": f"{self._folder}/slurmdbd.pid",
            "LogFile": f"{self._folder}/log/slurmdbd.log",
            "DebugLevel": "info",
        }
        conf = self._folder / "slurmdbd.conf"
        descriptor = os.open(conf, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # slurmdbd refuses a readable one
        with os.fdopen(descriptor, "w") as file:
            file.write("".join(f"{key}={value}\n" for key, value in values.items()))


def user_name() -> str:
    """Who the daemons run as, and who submits; never what a variable of the shell says."""
    return pwd.getpwuid(os.getuid()).pw_name


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0
