"""The ZeRO and mixed-precision training engine, on FSDP2."""
