"""How good a choice is: calibration texts, measured losses, and estimates of them."""
