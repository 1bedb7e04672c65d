"""The optimal learning rate of each setting, and power laws fitted to the optima."""
