"""A page to talk to a model about pictures and videos, and to see where it looked."""
