"""What a run keeps: the store, its digests and owner, and how a model begins."""
