"""Put the real DeepSpeed, the peer that tests compare with, into an ignored folder of the checkout: `make test` runs this.

Not into the environment: there `import deepspeed` must keep failing, as it does for users. The folder appears whole or not
at all, and is named by what it was made for, so a second run has nothing to do. Nothing is compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deepspeed_peer import FOLDER, VERSION

# What it imports beyond our own dependencies; without ninja it cannot compile anything by itself.
NEEDS = ["einops", "hjson", "msgpack", "psutil", "py-cpuinfo", "tqdm"]


def main() -> None:
    if FOLDER.exists():
        print(f"DeepSpeed: {FOLDER} is there")
        return
    print(f"DeepSpeed: installing {VERSION} into {FOLDER}", flush=True)
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="installing-", dir=FOLDER.parent) as name:
        half_done = Path(name) / FOLDER.name
        # Its setup.py imports torch, so it is built in this environment, which has it.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "5"]
        pip += ["--no-deps", "--no-build-isolation", "--target", str(half_done), f"deepspeed=={VERSION}", *NEEDS]
        subprocess.run(pip, check=True, env={**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"})
        if not FOLDER.exists():  # another run may have been faster
            half_done.rename(FOLDER)


if __name__ == "__main__":
    main()
