"""The schedulers: Slurm, and the same on this machine."""
