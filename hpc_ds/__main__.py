"""``python -m hpc_ds`` is ``hpcds``: job scripts call it by the interpreter that the job runs with."""

from hpc_ds.cli.entry import main

main()
