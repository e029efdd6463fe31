"""Weights of other layouts in and out: released, LLaVA-NeXT of transformers, CLIP + Llama joined."""
