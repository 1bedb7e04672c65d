"""The optimum of each setting and power laws through the optima."""
