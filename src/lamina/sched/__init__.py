"""Scheduling, pure: no torch, no clocks, no sockets."""
