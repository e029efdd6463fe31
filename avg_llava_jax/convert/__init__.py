"""Import and export of PyTorch layouts: released, LLaVA-NeXT of transformers, CLIP joined with Llama."""
