"""Devices and processes: the mesh, what lies where, and how processes agree."""
