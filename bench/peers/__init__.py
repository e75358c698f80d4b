"""Peers that take more than a call to call."""
