"""The ZeRO and mixed-precision training engine: flat buffers at stages 0 to 2, FSDP2 at stage 3."""
