"""Latency only: timing, sweeps, floors, statistics, reports."""
