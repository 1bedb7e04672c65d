"""The joint law: optimal learning rate, batch size, weight decay and minimum loss as one surface."""
