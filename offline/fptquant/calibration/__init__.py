"""Calibration text and what the quantized model does with it."""

from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.text import calibration_windows

__all__ = ["calibrate_and_round", "calibration_windows"]
