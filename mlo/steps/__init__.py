"""One step of one level: loss, gradient, optimizer."""
