"""The multimodal LLM as an embedder: backbones, compression tokens, visibility, pooling."""
