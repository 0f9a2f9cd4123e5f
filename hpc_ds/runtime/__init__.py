"""The rank-side half of a run: who am I, the process group, and the request to stop."""
