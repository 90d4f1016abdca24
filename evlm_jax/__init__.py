"""EVLM (arXiv 2407.14177) in JAX: gated cross-attention from hierarchical ViT features into a frozen language model."""
