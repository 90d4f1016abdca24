"""Side-by-side measurements against peers. They may need torch, transformers or llama.cpp; the package never does."""
