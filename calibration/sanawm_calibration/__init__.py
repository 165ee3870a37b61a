"""Calibration sets, activation statistics, precision recipes and quality reports."""
