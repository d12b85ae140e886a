"""Restoration of linear maps by least squares, for strategies that restore and for recoveries."""
