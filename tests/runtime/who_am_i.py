"""A rank that joins, adds its rank to the others', says what it found, and finds the same when it joins once more."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import hpc_ds

me = hpc_ds.init_distributed()
total = torch.tensor([float(me.rank)])
dist.all_reduce(total)
found = {"rank": me.rank, "local_rank": me.local_rank, "world_size": me.world_size, "source": me.source}
found |= {"interface": os.environ.get("GLOO_SOCKET_IFNAME"), "sum": total.item(), "env": os.environ["RANK"]}
if os.environ.get("FAIL_ON_START") == os.environ.get("TORCHELASTIC_RESTART_COUNT", "none") and me.rank == 1:
    sys.exit(1)
if "TORCHELASTIC_RUN_ID" not in os.environ:
    dist.destroy_process_group()
    again = hpc_ds.init_distributed(verbose=False)
    assert (again.rank, again.local_rank, again.source) == (me.rank, me.local_rank, me.source), again
Path(sys.argv[1], f"{me.rank}.json").write_text(json.dumps(found))
