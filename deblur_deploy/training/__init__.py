"""Make it: network, data, losses, training (torch)."""
