"""Allocate widths, cut neurons, repair what is left."""
