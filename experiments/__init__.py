"""Experiments: each module has `get_config(form)`, a ConfigDict."""
