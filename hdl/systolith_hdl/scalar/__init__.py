"""The scalar engine: ``function(x * scale + bias)`` from piecewise-polynomial tables."""
