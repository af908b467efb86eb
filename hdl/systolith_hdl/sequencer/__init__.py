"""Sequencers: one in-order instruction stream for each engine and DMA queue."""
