"""The vector engine: N lanes of two ALUs in a row, with reduction along the free axis."""
