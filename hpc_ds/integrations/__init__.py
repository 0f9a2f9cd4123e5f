"""What hpc_ds does in other people's training loops: Hugging Face's Trainer, and accelerate."""
