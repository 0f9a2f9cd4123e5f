"""The name ``deepspeed``, which stands for hpc_ds here. What it holds is listed in hpc_ds/compat/names.py."""

from hpc_ds.compat.modules import furnish

furnish(__name__)
