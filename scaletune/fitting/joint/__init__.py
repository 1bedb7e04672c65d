"""The law `joint`: lr, batch size, weight decay and minimum loss as one surface."""
