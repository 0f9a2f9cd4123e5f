"""Which ranks run where, and the runners that start them."""
