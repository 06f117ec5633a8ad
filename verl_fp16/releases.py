"""The releases of verl that this package is written for and tested with, oldest first. Imports nothing."""

SUPPORTED_VERL = ("0.8.0", "0.9.0", "0.9.1")

SUPPORTED_RANGE = f">={SUPPORTED_VERL[0]},<={SUPPORTED_VERL[-1]}"
