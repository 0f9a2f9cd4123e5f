"""One checkpoint format for every stage and world size: written whole or not at all."""
