"""int8 after training: calibrated, measured against a budget, and counted where it really runs."""
