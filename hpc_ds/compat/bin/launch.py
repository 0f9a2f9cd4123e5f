"""What the command ``deepspeed`` runs. A file, for ``python -m`` would look for our modules in the current folder first."""

import sys

from hpc_ds.cli.entry import main

sys.argv[1:1] = ["run", "--as-deepspeed"]
main()
