"""Calibration text, and ranges and rounding fitted to it layer by layer."""
