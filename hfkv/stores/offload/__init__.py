"""Offload: pages of which some lie on a device and the others in host memory."""
